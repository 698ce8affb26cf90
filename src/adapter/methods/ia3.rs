//! (IA)³ (Liu et al. 2022): a vector `l` scales activations. Feed-forward layers read scaled ones, `y = (l x) Wᵀ + b` with
//! `l` `[1, in]`; others give scaled ones, `y = l (x Wᵀ + b)` with `l` `[out, 1]`.

use crate::adapter::fold::{Fold, InputFold, OutputFold};
use crate::adapter::forms::LayerForm;
use crate::adapter::forms::scale::Scale;
use crate::adapter::held::Loader;
use crate::adapter::method::{AUTO, AdapterMethod, Settings, last_parts, target_layers, targets_in};
use crate::adapter::peft::{CONFIG, Found, KeyUse, Keys, Use, matches_any, regex};
use crate::adapter::tensor::{Stored, TensorSpec, Tensors};
use crate::error::{Error, Result};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param, Scaled};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// The keys of PEFT's IA3 configs (0.21).
const KEYS: &[KeyUse] = &[
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("feedforward_modules", Honoured, ""),
    ("init_ia3_weights", NoEffect, ""), // how it began
    ("target_modules", Honoured, ""),
];

/// Settings of (IA)³.
#[derive(Clone, Debug, PartialEq)]
pub struct Ia3 {
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
    /// Ends of the paths of those of them whose input is scaled.
    pub feedforward: Vec<String>,
    /// The same as an expression for whole paths, until the modules are known.
    expression: Option<String>,
}

impl Ia3 {
    /// Whether it scales the input of the module at the path `module`. As in PEFT, an end need not begin with a segment.
    fn is_feedforward(&self, module: &str) -> bool {
        self.feedforward.iter().any(|end| module.ends_with(end.as_str()))
    }
}

impl AdapterMethod for Ia3 {
    const PEFT_TYPE: &'static str = "IA3";
    const NAME: &'static str = "IA3";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["ia3_l"];
    // Scales lie near 1, where f16 has but three digits.
    const DIMENSIONS: &'static [usize] = &[2];
    const STORED: Stored = Stored::F32;
    const SETTINGS: &'static [&'static str] = &["targets", "feedforward-modules"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let key = "feedforward_modules";
        let (feedforward, expression) = match keys.get(key) {
            Some(Value::String(expression)) => (Vec::new(), Some(expression.clone())),
            _ => (keys.list(key)?, None),
        };
        if let Some(Value::Array(_)) = keys.get("target_modules") {
            let targets = keys.list("target_modules")?;
            if feedforward.iter().any(|name| !targets.contains(name)) {
                return Err(keys.wrong(key, "some of the names in `target_modules`"));
            }
        }
        Ok(Self { targets: Vec::new(), feedforward, expression })
    }

    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
        let expression = self.expression.take();
        let expression = expression.map(|key| Ok::<_, Error>((regex(path, &key, &format!("^(?:{key})$"))?, key)));
        let expression = expression.transpose()?;
        for module in found {
            let by_end = self.is_feedforward(&module.written);
            let feedforward = match &expression {
                Some((regex, key)) => matches_any(path, regex, key, module.names())?,
                None => by_end || self.is_feedforward(&module.path),
            };
            if feedforward && !self.is_feedforward(&module.path) {
                self.feedforward.push(module.path.clone());
            }
            let [shape] = &module.shapes[..] else { unreachable!("a shape for each of `PARTS`") };
            if shape[usize::from(!feedforward)] != 1 {
                let expected = match feedforward {
                    true => "a row `[1, in]`, as `feedforward_modules` names the module",
                    false => "a column `[out, 1]`, as `feedforward_modules` does not name the module",
                };
                let item = format!("tensor `{}.ia3_l`", module.path);
                return Err(Error::format(path, item, format!("{expected} in {CONFIG}"), format!("`{shape:?}`")));
            }
        }
        Ok(Vec::new())
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let scaled = model.scaled_by_default();
        let unknown = |setting: &str, expected: &str| {
            let got = format!("none, and PEFT has no default for the family `{}`", model.config().model_type);
            Error::config(setting, expected, got)
        };
        let targets = match (&settings.targets[..], scaled) {
            ([auto], Some(Scaled { outputs, inputs })) if auto == AUTO => {
                outputs.iter().chain(inputs).map(|&name| name.to_owned()).collect()
            }
            ([auto], None) if auto == AUTO => return Err(unknown("targets", "names of layers, or `all`")),
            (given, _) => given.to_vec(),
        };
        let layers = target_layers(model.params(), &targets)?;
        let targets = last_parts(model, &layers);
        let mut feedforward = settings.feedforward_modules.clone();
        if feedforward.is_empty() {
            let Some(Scaled { inputs, .. }) = scaled else {
                return Err(unknown("feedforward-modules", "those of the targets whose input is to be scaled"));
            };
            feedforward.extend(targets.iter().filter(|name| inputs.contains(&name.as_str())).cloned());
        }
        if let Some(other) = feedforward.iter().find(|name| !targets.contains(name)) {
            let expected = format!("some of the targets `{}`", targets.join("`, `"));
            return Err(Error::config("feedforward-modules", expected, other));
        }
        Ok((Self { targets, feedforward, expression: None }, layers))
    }

    fn shapes(&self, module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![if self.is_feedforward(module) { vec![1, input] } else { vec![out, 1] }]
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![1.0; spec.values()]
    }

    fn on_layer<B: Backend>(&self, module: &str, load: &mut Loader<'_, B>, _factor: f32) -> Result<Vec<LayerForm<B>>> {
        let scale = Arc::new(Scale { l: load.buffer("ia3_l")? });
        Ok(vec![if self.is_feedforward(module) { LayerForm::Input(scale) } else { LayerForm::Output(scale) }])
    }

    fn fold(&self, module: &str, _layer: [usize; 2], tensors: &Tensors, _factor: f32) -> Option<Box<dyn Fold>> {
        let l = tensors[&format!("{module}.ia3_l")].data.clone();
        Some(if self.is_feedforward(module) { Box::new(InputFold(l)) } else { Box::new(OutputFold(l)) })
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { targets: self.targets.clone(), feedforward_modules: self.feedforward.clone(), ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({


            "feedforward_modules": self.feedforward,
            "init_ia3_weights": true,

        })
    }

    fn describe(&self) -> (String, Value) {
        let text = format!("{}, the input of {} scaled", Self::NAME, self.feedforward.join(", "));
        let text = if self.feedforward.is_empty() { Self::NAME.to_owned() } else { text };
        (text, json!({"feedforward_modules": self.feedforward}))
    }
}
