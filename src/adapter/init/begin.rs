//! Gives a fresh LoRA the values that it begins with.

use super::{Init, Operator, Sketch, activations, from_weight, loftq::Rounded, orthogonal_halves, put};
use crate::adapter::method::layer_at;
use crate::adapter::methods::lora::Lora;
use crate::adapter::weight::Weight;
use crate::adapter::{Replaced, Tensors};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::format::Source;
use crate::rng::mix;
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};

/// Stream of random numbers for directions that are followed.
const STREAM: u64 = 9;

/// A module of a fresh LoRA.
struct Module {
    path: String,
    layer: Param,
    rank: usize,
    scale: f32,
}

impl Lora {
    /// The modules on linear layers that have `tensors`.
    fn modules(&self, model: &dyn Model, tensors: &Tensors) -> Vec<Module> {
        let module = |name: &String| {
            let path = name.strip_suffix(".lora_A.weight")?.to_owned();
            let (rank, scale) = self.of_module(&path);
            Some(Module { layer: layer_at(model, &path)?, path, rank, scale })
        };
        tensors.keys().filter_map(module).collect()
    }

    /// Puts what it begins with into its fresh `tensors` on `base`; what it looks at is `texts`, and a `source` with
    /// the base's weights in more bits. A beginning from gradients is a [`Sketch`]'s.
    ///
    /// # Errors
    /// There is no source and it needs one, or that has other weights; an id beyond the vocabulary; out of memory.
    pub(crate) fn begin_with<B: Backend>(
        &self,
        base: &Base<B>,
        tensors: &mut Tensors,
        texts: &[Vec<u32>],
        source: Option<&dyn Source>,
        seed: u64,
    ) -> Result<()> {
        let modules = self.modules(base.model.as_ref(), tensors);
        let (seed, replaced) = (mix(seed, STREAM), Replaced::default());
        match self.init {
            Init::Plain | Init::Gaussian | Init::LoraGa => {}
            Init::Eva => {
                let layers: Vec<(Param, usize)> = modules.iter().map(|m| (m.layer, m.rank)).collect();
                let found = activations::components(base, &layers, texts, seed)?;
                for (module, a) in modules.iter().zip(found) {
                    if let Some(own) = tensors.get_mut(&format!("{}.lora_A.weight", module.path)) {
                        own.data = a;
                    }
                }
            }
            Init::Corda(keep) => {
                let layers: Vec<(Param, usize, f32)> = modules.iter().map(|m| (m.layer, m.rank, m.scale)).collect();
                activations::covariances(base, &layers, texts, keep, seed, &mut |i, halves| {
                    put(tensors, &modules[i].path, halves);
                })?;
            }
            Init::Orthogonal | Init::Pissa(_) | Init::Milora | Init::Olora | Init::Loftq => {
                for (Module { path, layer, rank, scale }, i) in modules.iter().zip(0..) {
                    let seed = mix(seed, i);
                    let weight = Weight { base, replaced: &replaced, layer: *layer, counts: false };
                    let halves = match self.init {
                        Init::Orthogonal => Some(orthogonal_halves(Operator::shape(&weight), *rank, seed)),
                        Init::Loftq => {
                            let source = source.ok_or_else(|| {
                                Error::config("loftq-source", "a model with the base's weights in 16 bits", "none")
                            })?;
                            from_weight(self.init, &Rounded::read(&weight, source)?, *rank, *scale, seed)?
                        }
                        _ => from_weight(self.init, &weight, *rank, *scale, seed)?,
                    };
                    halves.into_iter().for_each(|halves| put(tensors, path, halves));
                }
            }
        }
        Ok(())
    }

    /// The gradients that it asks for to begin with, if it does.
    pub(crate) fn sketch(&self, model: &dyn Model, tensors: &Tensors, seed: u64) -> Option<Sketch> {
        let shape = |p: Param| {
            let shape = &model.params()[p.0 as usize].shape;
            [shape[0], shape[1]]
        };
        let modules = self.modules(model, tensors).into_iter().map(|m| (m.path, shape(m.layer), m.rank)).collect();
        (self.init == Init::LoraGa).then(|| Sketch::new(modules, mix(seed, STREAM)))
    }
}
