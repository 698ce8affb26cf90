//! ROAD (Liao & Monz 2024): what a layer gives, its bias included, is turned in pairs of columns: `y_i = a_i cos(t_i) x_i -
//! a_i sin(t_i) x_{i + h}` and `y_{i + h} = a_{i + h} cos(t_{i + h}) x_{i + h} + a_{i + h} sin(t_{i + h}) x_i`, with `2 h =
//! group_size` columns in a group. `road_1` has one angle `t` and length `a` for a pair, `road_2` for each output, `road_4` for
//! each output's cosine and sine. Backward computes what the layer gave once more.

use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, check_divides, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::{Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// The keys of PEFT's ROAD configs (0.21).
const KEYS: &[KeyUse] = &[
    ("exclude_modules", Honoured, ""),
    ("group_size", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("target_modules", Honoured, ""),
    ("variant", Honoured, ""),
];

/// Settings of ROAD.
#[derive(Clone, Debug, PartialEq)]
pub struct Road {
    /// 1, 2 or 4, for `road_1` and so on (`variant`).
    pub variant: usize,
    /// Columns of a group, an even number (`group_size`).
    pub group_size: usize,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// The factors of an output and of the other one of its pair.
struct Turn {
    variant: usize,
    half: usize,
    out: usize,
}

impl Turn {
    /// Of output `i`: the places of its cosine's and its sine's angle, and the sine's sign.
    fn places(&self, i: usize) -> (usize, usize, f32) {
        let (half, group) = (self.half, 2 * self.half);
        let (in_group, start) = (i % group, i / group);
        let sign = if in_group < half { -1.0 } else { 1.0 };
        match self.variant {
            1 => (start * half + in_group % half, start * half + in_group % half, sign),
            2 => (i, i, sign),
            _ => (start * 2 * group + in_group, start * 2 * group + group + in_group, sign),
        }
    }
}

impl Map for Turn {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let (alpha, theta) = (own[0], own[1]);
        let places = || (0..self.out).map(|i| self.places(i));
        let scale = places().map(|(c, ..)| alpha[c] * theta[c].cos()).collect();
        let turn = places().map(|(_, s, sign)| sign * alpha[s] * theta[s].sin()).collect();
        Ok(vec![scale, turn])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let (alpha, theta) = (own[0], own[1]);
        let (mut of_alpha, mut of_theta) = (vec![0.0; alpha.len()], vec![0.0; theta.len()]);
        for (i, (dc, ds)) in grads[0].iter().zip(grads[1]).enumerate() {
            let (c, s, sign) = self.places(i);
            of_alpha[c] += dc * theta[c].cos();
            of_theta[c] -= dc * alpha[c] * theta[c].sin();
            of_alpha[s] += ds * sign * theta[s].sin();
            of_theta[s] += ds * sign * alpha[s] * theta[s].cos();
        }
        vec![of_alpha, of_theta]
    }
}

impl AdapterMethod for Road {
    const PEFT_TYPE: &'static str = "ROAD";
    const NAME: &'static str = "ROAD";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["road_alpha", "road_theta"];
    // Factors lie near 1, where f16 has but three digits.
    const STORED: Stored = Stored::F32;
    const SETTINGS: &'static [&'static str] = &["targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let variant = match keys.text("variant")?.as_deref() {
            None | Some("road_1") => 1,
            Some("road_2") => 2,
            Some("road_4") => 4,
            Some(_) => return Err(keys.wrong("variant", "`road_1`, `road_2` or `road_4`")),
        };
        let group_size = keys.whole("group_size", 2, 64)?;
        if !group_size.is_multiple_of(2) {
            return Err(keys.wrong("group_size", "an even number"));
        }
        Ok(Self { variant, group_size, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[], settings, model)?;
        let outs = layers.iter().map(|p| model.params()[p.0 as usize].shape[0]);
        match outs.into_iter().find(|out| out % method.group_size > 0) {
            Some(out) => {
                let expected = format!("a `group_size` that divides the {out} outputs of every layer");
                Err(Error::config("options", expected, format!("group_size={}", method.group_size)))
            }
            None => Ok((method, layers)),
        }
    }

    fn shapes(&self, _module: &str, [out, _]: [usize; 2]) -> Vec<Vec<usize>> {
        // Of outputs that are no whole number of groups there is nothing that fits.
        let whole = if out.is_multiple_of(self.group_size) { out } else { 0 };
        vec![vec![whole * self.variant / 2]; 2]
    }

    fn start(&self, spec: &TensorSpec, part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![if part == 0 { 1.0 } else { 0.0 }; spec.values()]
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, _factor: f32) -> Result<Plan> {
        let ([out, _], half) = (weight.shape(), self.group_size / 2);
        check_divides(module, out, self.group_size, "group_size")?;
        let (scale, turn) = (Some(Of::Made(vec![out])), Some((Of::Made(vec![out]), half)));
        let pieces = vec![Piece::Output { scale, turn, shift: None }];
        Ok(Plan::made(pieces, Turn { variant: self.variant, half, out }))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
             "group_size": self.group_size,
             "variant": format!("road_{}", self.variant),
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"variant": self.variant, "group_size": self.group_size});
        let text = format!("{} {} in groups of {}", Self::NAME, self.variant, self.group_size);
        (text, keys)
    }
}
