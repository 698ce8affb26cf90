//! LoRA on the experts of a layer as PEFT keeps it (`target_parameters`): one A `[E r, in]` and one B `[out, r E]` for all
//! experts. Rows `e r ..` of A are expert `e`'s, and so is every `E`-th column of B from `e` on. Gate and up projection share
//! theirs, with the gate's rows of B first. Here each expert's projections are layers of their own.

use super::{AdapterFile, HostTensor, Method};
use pocketlora_models::{Model, ParamSpec};

/// What checkpoints call an expert's gate, up and down projection.
const PROJECTIONS: [[&str; 3]; 2] = [["gate_proj", "up_proj", "down_proj"], ["w1", "w3", "w2"]];
/// What PEFT calls the first two as one weight, and the last.
pub(super) const FUSED: [&str; 2] = ["gate_up_proj", "down_proj"];

/// Whether the module at `path` is a weight of all experts of a layer.
pub(super) fn is_fused(path: &str) -> bool {
    path.rsplit_once('.').is_some_and(|(experts, weight)| experts.ends_with(".experts") && FUSED.contains(&weight))
}

/// `file` with the experts' terms apart, as far as `model` has such experts.
pub(super) fn apart(file: &AdapterFile, model: &dyn Model) -> AdapterFile {
    let mut all = file.clone();
    let Method::Lora(lora) = &mut all.method else { return all };
    let has = |module: &str| model.params().iter().any(|spec: &ParamSpec| spec.module() == module);
    let fused: Vec<&str> = file.modules().filter(|module| is_fused(module)).collect();
    for module in fused {
        let (rank, factor) = lora.of_module(module);
        let name = |part: &str| format!("{module}.{part}.weight");
        let (a, b) = (&file.tensors[&name("lora_A")], &file.tensors[&name("lora_B")]);
        let experts = a.shape[0] / rank;
        let Some((path, weight)) = module.rsplit_once('.') else { continue };
        let names = PROJECTIONS.iter().find(|names| has(&format!("{path}.0.{}", names[0])));
        let Some(names) = names.filter(|names| has(&format!("{path}.{}.{}", experts - 1, names[0]))) else { continue };
        let own = if weight == FUSED[0] { &names[..2] } else { &names[2..] };
        if b.shape[0] % own.len() != 0 || has(&format!("{path}.{experts}.{}", names[0])) {
            continue;
        }
        let rows = b.shape[0] / own.len();
        for expert in 0..experts {
            for (part, projection) in own.iter().enumerate() {
                let layer = format!("{path}.{expert}.{projection}");
                let cols = a.shape[1];
                let own_a = a.data[expert * rank * cols..(expert + 1) * rank * cols].to_vec();
                let of_rows = b.data[part * rows * b.shape[1]..(part + 1) * rows * b.shape[1]].chunks(b.shape[1]);
                let own_b = of_rows.flat_map(|row| row.iter().skip(expert).step_by(experts).copied()).collect();
                all.tensors
                    .insert(format!("{layer}.lora_A.weight"), HostTensor { shape: vec![rank, cols], data: own_a });
                all.tensors
                    .insert(format!("{layer}.lora_B.weight"), HostTensor { shape: vec![rows, rank], data: own_b });
                lora.set_module(layer, rank, factor);
            }
        }
        all.tensors.remove(&name("lora_A"));
        all.tensors.remove(&name("lora_B"));
    }
    all
}
