//! LoRA-FA (Zhang et al. 2023): LoRA whose `A` stays as it was drawn; only `B` is trained. Gradients and the optimizer's state are
//! those of `B` alone, and the file is that of a LoRA, which is what it is once it is saved.

use super::lora::{self, Lora, begin_on_layers};
use crate::adapter::method::{AdapterMethod, Group, Settings, targets_in};
use crate::adapter::peft::{Found, KeyUse, Keys};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::Result;
use pocketlora_models::{Model, Param};
use serde_json::Value;
use std::path::Path;

/// The LoRA that it is.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFa(pub Lora);

impl AdapterMethod for LoraFa {
    const PEFT_TYPE: &'static str = "LORA";
    const NAME: &'static str = "LoRA-FA";
    const KEYS: &'static [KeyUse] = lora::KEYS;
    const PARTS: &'static [&'static str] = &["lora_A.weight", "lora_B.weight"];
    const DIMENSIONS: &'static [usize] = &[2, 2];
    const FROZEN: &'static [&'static str] = &["lora_A.weight"];
    const STORED: Stored = Stored::F16;
    const HAS_STRENGTH: bool = true;
    // No file asks for it: a file of it is a LoRA's.
    const ASKED_BY: Option<&'static str> = Some("lora_fa");
    const SETTINGS: &'static [&'static str] = Lora::SETTINGS;
    const IN_TRAINING: &'static [&'static str] = &["dropout"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        Lora::read(keys).map(Self)
    }

    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
        self.0.check(path, found)
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (lora, layers) = begin_on_layers(settings, model, Self::NAME)?;
        Ok((Self(lora), layers))
    }

    fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
        self.0.shapes(module, layer)
    }

    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        self.0.start(spec, part, module, seed)
    }

    fn plan(&self, module: &str, _weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let factor = self.0.of_module(module).1 * factor;
        let (a, b) = (Of::Part("lora_A.weight"), Of::Part("lora_B.weight"));
        Ok(Plan::plain(vec![Piece::LowRank { a, b, factor }]))
    }

    fn group(&self, _name: &str, _settings: &Settings) -> Group {
        Group { rate: 1.0, decays: true }
    }

    fn settings(&self, settings: Settings) -> Settings {
        self.0.settings(settings)
    }

    fn set_in_training(&mut self, settings: &Settings) {
        self.0.set_in_training(settings);
    }

    targets_in!(0.targets);

    fn write(&self) -> Value {
        self.0.write()
    }

    fn describe(&self) -> (String, Value) {
        let (text, keys) = self.0.describe();
        (text.replacen("LoRA", Self::NAME, 1), keys)
    }
}
