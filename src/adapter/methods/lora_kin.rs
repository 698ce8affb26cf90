//! What methods have in common that are LoRAs in the end: they train some other numbers, of which `A` and `B` follow,
//! and their file is that of a plain LoRA, which every reader of PEFT's files serves. No file asks for one of them.
//! Each holds the LoRA that it becomes in a field `lora`, and its own settings, which are options of a run.

use super::lora::Lora;
use crate::adapter::init::{Progress, go_on, put};
use crate::adapter::method::{AdapterMethod, Settings, begin_with, layer_at, options_of};
use crate::adapter::weight::Weight;
use crate::adapter::{HostTensor, Method, Replaced, Tensors};
use crate::base::Base;
use crate::error::Result;
use crate::rng::mix;
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};

/// Stream of random numbers for directions of weights.
const STREAM: u64 = 10;

/// A fresh one for `model`, with the layers that it is for.
///
/// # Errors
/// A target names no layer, an option is out of range or unknown.
pub(super) fn begin<M: AdapterMethod>(settings: &Settings, model: &dyn Model) -> Result<(M, Vec<Param>)> {
    let own =
        [("lora_alpha", settings.alpha.into()), ("r", settings.rank.into()), ("use_rslora", settings.rslora.into())];
    let (mut method, layers): (M, Vec<Param>) = begin_with(&own, settings, model)?;
    method.set_in_training(settings);
    Ok((method, layers))
}

/// What `method`, whose LoRA is `lora`, decides of `settings`.
pub(super) fn settings<M: AdapterMethod>(method: &M, lora: &Lora, settings: Settings) -> Settings {
    let (Lora { rank, alpha, rslora, dropout, .. }, targets) = (lora, lora.targets.clone());
    let options = options_of(&settings.options, &method.write());
    Settings { rank: *rank, alpha: *alpha, rslora: *rslora, dropout: *dropout, targets, options, ..settings }
}

/// Makes the tensors of a plain LoRA of those of training: `halves` has `A` and `B` of a module, of the tensors of its
/// parts.
pub(super) fn plain(tensors: &mut Tensors, parts: &[&str], halves: &dyn Fn(&[HostTensor]) -> [HostTensor; 2]) {
    let ends = |name: &String| name.strip_suffix(parts[0]).map(str::to_owned);
    let modules: Vec<String> = tensors.keys().filter_map(ends).collect();
    for module in modules {
        let own: Vec<HostTensor> = parts.iter().filter_map(|part| tensors.remove(&format!("{module}{part}"))).collect();
        let [a, b] = halves(&own);
        tensors.insert(format!("{module}lora_A.weight"), a);
        tensors.insert(format!("{module}lora_B.weight"), b);
    }
}

impl Method {
    /// Puts into the fresh `tensors` of a method that works with the singular vectors of weights what is theirs. `progress`
    /// hears of modules.
    ///
    /// # Errors
    /// Stopped, out of memory.
    pub(crate) fn begin_with_weights<B: Backend>(
        &self,
        base: &Base<B>,
        tensors: &mut Tensors,
        seed: u64,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let Self::LoraXs(own) = self else { return Ok(()) };
        let replaced = Replaced::default();
        let modules: Vec<String> =
            tensors.keys().filter_map(|name| name.strip_suffix(".lora_A.weight").map(str::to_owned)).collect();
        for (i, module) in modules.iter().enumerate() {
            go_on(progress, i, modules.len())?;
            let Some(layer) = layer_at(base.model.as_ref(), module) else { continue };
            let weight = Weight { base, replaced: &replaced, layer, counts: false };
            let halves = crate::adapter::init::singular(&weight, own.lora.rank, mix(mix(seed, STREAM), i as u64))?;
            put(tensors, module, halves);
        }
        Ok(())
    }
}

/// The functions of [`AdapterMethod`] that are the same for all of them.
macro_rules! kin_of_lora {
    ($asked:literal) => {
        const PEFT_TYPE: &'static str = "LORA";
        const STORED: $crate::adapter::Stored = $crate::adapter::Stored::F16;
        const HAS_STRENGTH: bool = true;
        const ASKED_BY: Option<&'static str> = Some($asked);
        const SETTINGS: &'static [&'static str] = &["rank", "alpha", "rslora", "targets", "options"];
        const IN_TRAINING: &'static [&'static str] = &["dropout"];

        fn settings(&self, settings: Settings) -> Settings {
            $crate::adapter::methods::lora_kin::settings(self, &self.lora, settings)
        }

        fn set_in_training(&mut self, settings: &Settings) {
            self.lora.set_in_training(settings);
        }

        $crate::adapter::method::targets_in!(lora.targets);

        fn describe(&self) -> (String, Value) {
            let (text, keys) = self.lora.describe();
            (text.replacen("rsLoRA", "LoRA", 1).replacen("LoRA", Self::NAME, 1), keys)
        }
    };
}
pub(super) use kin_of_lora;

/// The LoRA that the config of one of them has, and keys of a config that all of them read.
pub(super) fn read(keys: &crate::adapter::peft::Keys<'_>) -> Result<Lora> {
    let rank = keys.whole("r", 1, 8)?;
    let alpha = keys.number("lora_alpha", Some(2.0 * rank as f64))?;
    Ok(Lora { rslora: keys.flag("use_rslora")?, ..Lora::new(rank, alpha) })
}
