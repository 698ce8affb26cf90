//! The mixer of Mamba 2 (Dao & Gu 2024): a short convolution, a state space and a gate.

use crate::config::ConfigError;
use crate::exec::Exec;
use crate::keys::Keys;
use crate::op::{Conv, Linear, Map, Norm, StateId, StateSpace, StateSpec, Value};
use crate::outline::Builder;

/// What families differ in.
#[derive(Clone, Copy)]
pub(crate) struct MambaSpec {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) groups: usize,
    pub(crate) state_dim: usize,
    /// Width of the convolution.
    pub(crate) taps: usize,
    pub(crate) conv_bias: bool,
    /// Of the projections in and out.
    pub(crate) bias: bool,
    /// Least and greatest step.
    pub(crate) limits: (f32, f32),
    pub(crate) norm: Option<GatedNorm>,
    /// Factors on the parts `z`, `x`, `b`, `c` and `dt` of what goes in.
    pub(crate) factors: [f32; 5],
}

/// The norm of what the state space gives, of each group's heads by themselves.
#[derive(Clone, Copy)]
pub(crate) struct GatedNorm {
    pub(crate) eps: f32,
    /// It comes before the gate.
    pub(crate) before_gate: bool,
}

pub(crate) struct Mamba {
    spec: MambaSpec,
    input: Linear,
    conv: Conv,
    conv_state: StateId,
    space: StateSpace,
    state: StateId,
    norm: Option<Norm>,
    out: Linear,
}

impl MambaSpec {
    /// Reads and checks what hybrid families call `mamba_..`.
    pub(crate) fn hybrid(keys: &Keys<'_>, hidden: usize) -> Result<Self, ConfigError> {
        let heads = keys.count_or("mamba_n_heads", 128)?;
        let inner = match keys.optional_size("mamba_d_ssm")? {
            Some(inner) => inner,
            None => keys.count_or("mamba_expand", 2)? * hidden,
        };
        let head_dim = match keys.get("mamba_d_head").and_then(|dim| dim.as_str()) {
            Some("auto") => inner / heads,
            _ => keys.optional_size("mamba_d_head")?.unwrap_or(inner / heads),
        };
        if heads * head_dim != inner {
            return Err(ConfigError::new(
                "mamba_d_head",
                format!("a width of {heads} heads that make {inner}"),
                head_dim,
            ));
        }
        let spec = Self {
            heads,
            head_dim,
            groups: keys.count_or("mamba_n_groups", 1)?,
            state_dim: keys.count_or("mamba_d_state", 256)?,
            taps: keys.count_or("mamba_d_conv", 4)?,
            conv_bias: keys.flag("mamba_conv_bias", true)?,
            bias: keys.flag("mamba_proj_bias", false)?,
            limits: limits(keys)?,
            norm: None,
            factors: [1.0; 5],
        };
        spec.check("mamba_n_groups")?;
        Ok(spec)
    }

    /// Checks the groups, which the key `key` gives.
    pub(crate) fn check(&self, key: &str) -> Result<(), ConfigError> {
        if self.heads.is_multiple_of(self.groups) {
            return Ok(());
        }
        Err(ConfigError::new(key, format!("a divisor of {} heads", self.heads), self.groups))
    }

    /// Widths of the parts `z`, `x`, `b`, `c` and `dt` of what goes in.
    fn widths(&self) -> [usize; 5] {
        let (inner, states) = (self.heads * self.head_dim, self.groups * self.state_dim);
        [inner, inner, states, states, self.heads]
    }
}

/// `time_step_limit`, two numbers; transformers writes one without bounds as an object.
pub(crate) fn limits(keys: &Keys<'_>) -> Result<(f32, f32), ConfigError> {
    const KEY: &str = "time_step_limit";
    let Some(value) = keys.get(KEY) else { return Ok((0.0, f32::INFINITY)) };
    let number = |value: &serde_json::Value| match value.get("__float__").unwrap_or(value) {
        serde_json::Value::String(text) if text == "Infinity" => Some(f64::INFINITY),
        number => number.as_f64(),
    };
    let limits = value.as_array().and_then(|list| list.iter().map(number).collect::<Option<Vec<f64>>>());
    match limits.as_deref() {
        Some(&[least, most]) if least >= 0.0 && most > least => Ok((least as f32, most as f32)),
        _ => Err(ConfigError::new(KEY, "two numbers from 0 on, the smaller one first", value)),
    }
}

impl Mamba {
    /// Declares the mixer of the module `at`.
    pub(crate) fn new(b: &mut Builder, at: &str, spec: MambaSpec) -> Self {
        let MambaSpec { heads, head_dim, groups, state_dim, bias, .. } = spec;
        let (hidden, widths) = (b.config.hidden_size, spec.widths());
        let (inner, channels) = (widths[0], widths[1] + widths[2] + widths[3]);
        let (conv, conv_state) = b.conv(&format!("{at}.conv1d"), channels, spec.taps, spec.conv_bias);
        let vector = |b: &mut Builder, name: &str| b.vector(format!("{at}.{name}"), heads);
        Self {
            spec,
            input: b.linear(&format!("{at}.in_proj"), widths.iter().sum(), hidden, bias),
            conv,
            conv_state,
            space: StateSpace {
                rate: vector(b, "A_log"),
                bias: vector(b, "dt_bias"),
                skip: vector(b, "D"),
                heads,
                head_dim,
                groups,
                state_dim,
                limits: spec.limits,
            },
            state: b.state(StateSpec::Matrix { heads, key: state_dim, value: head_dim }),
            norm: spec.norm.map(|GatedNorm { eps, .. }| {
                let norm = b.rms_norm(&format!("{at}.norm"), inner, eps);
                Norm { width: inner / groups, ..norm }
            }),
            // PEFT refuses adapters on it, for fast kernels read its weight past them.
            out: b.fixed(&format!("{at}.out_proj"), hidden, inner, bias),
        }
    }

    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let [inner, _, states, _, heads] = self.spec.widths();
        let mut h = ex.linear(self.input, h);
        if self.spec.factors != [1.0; 5] {
            let parts: Vec<_> = self.spec.widths().into_iter().zip(self.spec.factors).collect();
            h = ex.scale_parts(&parts, h);
        }
        let [z, xbc, dt] = ex.split(h, [inner, inner + 2 * states, heads]);
        let xbc = ex.conv(self.conv_state, self.conv, xbc);
        let xbc = ex.map(Map::Silu, xbc);
        let xbc = ex.split(xbc, [inner, states, states]);
        let y = ex.state_space(self.state, self.space, xbc, dt);
        let before_gate = self.spec.norm.is_some_and(|norm| norm.before_gate);
        let y = match self.norm {
            Some(norm) if before_gate => {
                let y = ex.norm(norm, y);
                ex.swiglu(z, y)
            }
            Some(norm) => {
                let y = ex.swiglu(z, y);
                ex.norm(norm, y)
            }
            None => ex.swiglu(z, y),
        };
        ex.linear(self.out, y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn limits_of_steps_are_read_with_and_without_bounds() {
        let read = |value| limits(&Keys(json!({"time_step_limit": value}).as_object().unwrap()));
        assert_eq!(read(json!(null)).unwrap(), (0.0, f32::INFINITY));
        assert_eq!(read(json!([0.5, 2])).unwrap(), (0.5, 2.0));
        assert_eq!(read(json!([0.0, {"__float__": "Infinity"}])).unwrap(), (0.0, f32::INFINITY));
        for wrong in [json!([1.0]), json!([2.0, 1.0]), json!([-1.0, 1.0]), json!("none"), json!([0.0, "NaN"])] {
            assert_eq!(read(wrong.clone()).unwrap_err().key, "time_step_limit", "{wrong}");
        }
    }
}
