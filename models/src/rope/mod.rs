//! Rotary position embedding: which keys of `config.json` describe it, and the frequencies they give.

mod scaling;

use crate::config::{Config, ConfigError};
use crate::keys::Keys;
use crate::windows;
use scaling::{Parameters, Scaling};
use serde_json::{Map, Value};

/// Angles of a rotary embedding (Su et al. 2021): position `p` turns pair `i` by `p * inv_freq[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle per position of each turned pair of a head, at most `D / 2`, in radians.
    pub inv_freq: Vec<f32>,
    /// Factor on every cosine and sine (YaRN's and LongRoPE's); 1 for all others.
    pub attention_factor: f32,
    /// Pair `i` is elements `2 i` and `2 i + 1` of a head, rather than `i` and `i + R` of `R` pairs.
    pub pairs: bool,
    /// What long texts turn by instead.
    pub long: Option<LongRope>,
    /// A factor on cosines and sines that grows along the text.
    pub growth: Option<Growth>,
}

/// The angles of all positions in a text of more than `beyond` tokens (LongRoPE, Ding et al. 2024).
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// Tokens of the longest text without them.
    pub beyond: usize,
    /// As [`Rope::inv_freq`].
    pub inv_freq: Vec<f32>,
}

/// The factor `1 + beta ln(1 + floor(p / every))` at position `p`: queries that see more tokens are sharpened (Llama 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    /// See above.
    pub beta: f32,
    /// Positions that have the same factor.
    pub every: usize,
}

impl Rope {
    /// The angle per position of each pair, in a text that is taken to reach so many tokens.
    #[must_use]
    pub fn frequencies(&self, reach: usize) -> &[f32] {
        self.long.as_ref().filter(|long| reach > long.beyond).map_or(&self.inv_freq, |long| &long.inv_freq)
    }

    /// The factor on cosines and sines at `position`.
    #[must_use]
    pub fn factor(&self, position: usize) -> f32 {
        let grown = |growth: Growth| 1.0 + growth.beta * (1.0 + (position / growth.every) as f32).ln();
        self.attention_factor * self.growth.map_or(1.0, grown)
    }

    /// The same angles in all layers of `config`'s model.
    pub(crate) fn everywhere(self, config: &Config) -> Vec<Option<[Self; 2]>> {
        vec![self.of_both(); config.layers]
    }

    /// The same angles for queries and keys.
    pub(crate) fn of_both(self) -> Option<[Self; 2]> {
        Some([self.clone(), self])
    }
}

/// Which keys describe a rotary embedding, and what a family takes for those that a file leaves out.
#[derive(Clone, Copy)]
pub(crate) struct RopeKeys {
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// Longest context, in tokens.
    pub(crate) positions: usize,
    /// The base.
    pub(crate) theta: f64,
    /// The base, whatever the file says.
    pub(crate) base: Option<f64>,
    /// Key of the base in files from before transformers 5.
    pub(crate) theta_key: &'static str,
    /// Whether `rope_scaling` of such a file is about these layers.
    pub(crate) scaled: bool,
    /// The kind of layers, where `rope_parameters` has an object for each kind.
    pub(crate) layers: Option<&'static str>,
    /// Share of a head that turns, in families where it may be less than all.
    pub(crate) partial: Option<f64>,
    /// See [`Rope::pairs`].
    pub(crate) pairs: bool,
    /// Further keys of the object: those that the family reads itself, or that change nothing for text.
    pub(crate) more: &'static [&'static str],
}

impl RopeKeys {
    /// One embedding for all layers that turns whole heads, with base 10,000 where the file has none.
    pub(crate) fn of(config: &Config) -> Self {
        Self {
            head_dim: config.head_dim,
            positions: config.max_positions,
            theta: 10_000.0,
            base: None,
            theta_key: "rope_theta",
            scaled: true,
            layers: None,
            partial: None,
            pairs: false,
            more: &[],
        }
    }

    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it).
    pub(crate) fn read(&self, keys: &Keys<'_>) -> Result<Rope, ConfigError> {
        let (new, old) = (self.parameters(keys)?, keys.object("rope_scaling")?.filter(|_| self.scaled));
        if let (Some(new), Some(old)) = (&new, &old)
            && !old.0.is_empty()
            && comparable(new) != comparable(old)
        {
            return Err(ConfigError::new(
                "rope_scaling",
                "the same as in `rope_parameters`",
                Value::from(old.0.clone()),
            ));
        }
        let nested = new.or(old).filter(|n| !n.0.is_empty());
        let theta = match nested.as_ref().filter(|n| n.get("rope_theta").is_some()) {
            Some(nested) => nested.required_number("rope_theta")?,
            None => keys.number(self.theta_key, self.theta)?,
        };
        let named = if self.base.is_some() { "layer_rope_theta" } else { self.theta_key };
        let beside = keys.number(self.theta_key, theta)?;
        if beside != theta {
            return Err(ConfigError::new(self.theta_key, format!("{theta}, as in `rope_parameters`"), beside));
        }
        let theta = self.base.unwrap_or(theta);
        // The upper bounds, here and below, keep every angle a finite f32.
        if !(theta > 1.0 && theta < 1e30) {
            return Err(ConfigError::new(named, "a number from 1 to 1e30", theta));
        }
        let proportional = |nested: &Keys<'_>| Ok(nested.text("rope_type")? == Some("proportional"));
        let turned = match nested.as_ref().map_or(Ok(false), proportional)? {
            // Pairs that do not turn are among those of the whole head.
            true => self.head_dim,
            false => self.turned(keys, nested.as_ref())?,
        };
        let scaling = match nested {
            Some(rope) => Scaling::read(&Parameters { rope, config: keys, family: self, theta, turned })?,
            None => Scaling::Default,
        };
        // transformers computes the exponent and the power in f32; doing so too keeps the angles bit-equal.
        let periods = (0..turned / 2).map(|i| (i, (theta as f32).powf((2 * i) as f32 / turned as f32)));
        let long = scaling.long().map(|(beyond, factors)| LongRope {
            beyond,
            inv_freq: periods.clone().map(|(i, period)| 1.0 / (factors[i] * period)).collect(),
        });
        let inv_freq = periods.map(|(i, period)| scaling.apply(i, period)).collect();
        let attention_factor = scaling.attention_factor();
        Ok(Rope { inv_freq, attention_factor, pairs: self.pairs, long, growth: None })
    }

    /// What says how angles are stretched, in either form of the file.
    pub(crate) fn nested<'a>(&self, keys: &Keys<'a>) -> Result<Option<Keys<'a>>, ConfigError> {
        let nested = self.parameters(keys)?.map_or_else(|| keys.object("rope_scaling"), |new| Ok(Some(new)))?;
        Ok(nested.filter(|nested| !nested.0.is_empty()))
    }

    /// `rope_parameters`, or the object in it that is about these layers.
    fn parameters<'a>(&self, keys: &Keys<'a>) -> Result<Option<Keys<'a>>, ConfigError> {
        let all = keys.object("rope_parameters")?;
        let (Some(all), Some(layers)) = (&all, self.layers) else { return Ok(all) };
        match all.names().find(|&name| ![windows::FULL, windows::SLIDING].contains(&name)) {
            None => all.object(layers),
            Some(name) => {
                let expected = format!("`{}` or `{}` in `rope_parameters`", windows::FULL, windows::SLIDING);
                Err(ConfigError::unsupported(name, expected, &all.0[name]))
            }
        }
    }

    /// Dimensions of a head that turn.
    fn turned(&self, keys: &Keys<'_>, nested: Option<&Keys<'_>>) -> Result<usize, ConfigError> {
        let key = "partial_rotary_factor";
        if let Some(rotated) = keys.get("rotary_dim").filter(|dim| dim.as_u64() != Some(self.head_dim as u64)) {
            let expected = format!("nothing or the whole head's {}", self.head_dim);
            return Err(ConfigError::unsupported("rotary_dim", expected, rotated));
        }
        let Some(default) = self.partial else {
            // Beside the object, `known.rs` has seen to it.
            return match nested.map_or(Ok(1.0), |nested| nested.number(key, 1.0))? {
                1.0 => Ok(self.head_dim),
                share => Err(ConfigError::unsupported(key, "1, for these families turn whole heads", share)),
            };
        };
        let beside = keys.number(key, default)?;
        let share = nested.map_or(Ok(beside), |nested| nested.number(key, beside))?;
        if keys.number(key, share)? != share {
            return Err(ConfigError::new(key, format!("{share}, as in `rope_parameters`"), beside));
        }
        let turned = (self.head_dim as f64 * share) as usize;
        if share > 1.0 || turned == 0 || !turned.is_multiple_of(2) {
            let expected = format!("a share of a head's {} dimensions that is an even number", self.head_dim);
            return Err(ConfigError::new(key, expected, share));
        }
        Ok(turned)
    }
}

/// What is compared where a file says it twice: everything but the base, with one spelling of the kind.
fn comparable(rope: &Keys<'_>) -> Map<String, Value> {
    let mut map = rope.0.clone();
    map.remove("rope_theta");
    if let Some(kind) = map.remove("type") {
        map.entry("rope_type").or_insert(kind);
    }
    if map.get("rope_type").is_some_and(|kind| kind == "default") {
        map.remove("rope_type");
    }
    map.retain(|_, value| !value.is_null());
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Head size 16 and a context of 512.
    const PLAIN: RopeKeys = RopeKeys {
        head_dim: 16,
        positions: 512,
        theta: 10_000.0,
        base: None,
        theta_key: "rope_theta",
        scaled: true,
        layers: None,
        partial: None,
        pairs: false,
        more: &[],
    };

    fn parse(change: Value) -> Result<Rope, ConfigError> {
        read(&PLAIN, change)
    }

    fn read(family: &RopeKeys, change: Value) -> Result<Rope, ConfigError> {
        let Value::Object(map) = change else { unreachable!() };
        family.read(&Keys(&map))
    }

    fn key_of(change: Value) -> String {
        match parse(change.clone()) {
            Err(e) => e.key,
            Ok(rope) => panic!("{change} was accepted: {rope:?}"),
        }
    }

    #[test]
    fn yarn_is_that_of_transformers() {
        // `_compute_yarn_parameters` of transformers 5.24, in f32.
        let cases = [
            (
                json!({"factor": 4.0, "original_max_position_embeddings": 128}),
                1.138_629_4,
                [1.0, 0.237_170_82, 0.049_999_997, 0.007_905_695, 0.0025, 0.000_790_569_5, 0.000_25, 7.905_694e-5],
            ),
            (
                json!({"factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.75,
                       "beta_fast": 64, "beta_slow": 0.1}),
                0.75,
                [1.0, 0.2687936, 0.07, 0.017392527, 0.0039999997, 0.00079056947, 0.00025, 7.905695e-05],
            ),
            (
                json!({"factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.8, "mscale_all_dim": 0.5,
                       "truncate": false}),
                1.056_508,
                [
                    1.0,
                    0.178_976_15,
                    0.013_194_458,
                    0.003_952_847_3,
                    0.001_25,
                    0.000_395_284_73,
                    0.000_125,
                    3.952_847_3e-5,
                ],
            ),
            (
                json!({"original_max_position_embeddings": 100, "rope_theta": 500_000.0}),
                1.163_315_4,
                [
                    1.0,
                    0.115_899_146,
                    0.007_344_928,
                    0.001_424_348_6,
                    0.000_276_213_6,
                    5.356_41e-5,
                    1.038_729_7e-5,
                    2.014_333_2e-6,
                ],
            ),
        ];
        for (change, attention_factor, want) in cases {
            // Both spellings of the object and of the kind.
            for (object, kind) in
                [("rope_scaling", "type"), ("rope_scaling", "rope_type"), ("rope_parameters", "rope_type")]
            {
                let mut scaling = change.clone();
                scaling[kind] = json!("yarn");
                let rope = parse(json!({object: scaling})).unwrap();
                assert!((rope.attention_factor - attention_factor).abs() < 1e-6, "{change}: {rope:?}");
                for (got, want) in rope.inv_freq.iter().zip(want) {
                    let want: f32 = want;
                    assert!((got - want).abs() <= 1e-6 * want, "{change}: {:?}, not {want}", rope.inv_freq);
                }
            }
        }
    }

    #[test]
    fn dynamic_changes_nothing_within_the_context_and_linear_divides() {
        let plain = parse(json!({})).unwrap();
        assert_eq!(parse(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}})).unwrap(), plain);
        assert_eq!(parse(json!({"rope_scaling": {}})).unwrap(), plain);
        assert_eq!(parse(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}})).unwrap(), plain);
        let linear = parse(json!({"rope_scaling": {"type": "linear", "factor": 4.0}})).unwrap();
        assert!(linear.inv_freq.iter().zip(&plain.inv_freq).all(|(a, b)| *a == b / 4.0));
    }

    #[test]
    fn what_would_be_ignored_is_refused_by_name() {
        let yarn = |key: &str, value: Value| json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, key: value}});
        let cases = [
            (json!({"rope_scaling": {"type": "mrope", "factor": 4.0}}), "rope_type"),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 4.0, "alpha": 2.0}}), "alpha"),
            (json!({"rope_scaling": {"type": "longrope", "factor": 4.0}}), "short_factor"),
            (
                json!({"rope_scaling": {"type": "su", "short_factor": vec![1; 8], "long_factor": vec![1; 7]}}),
                "long_factor",
            ),
            (json!({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}}), "type"),
            (json!({"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}}), "beta_fast"),
            (json!({"rope_scaling": {"type": "linear"}}), "factor"),
            (json!({"rope_scaling": {"type": "dynamic"}}), "factor"),
            (json!({"rope_scaling": {"mrope_section": [1, 2]}}), "mrope_section"),
            (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "full_attention"),
            (yarn("partial_rotary_factor", json!(0.5)), "partial_rotary_factor"),
            (yarn("mscale", json!(0.7)), "mscale_all_dim"),
            (yarn("mscale_all_dim", json!(0.7)), "mscale"),
            (yarn("beta_slow", json!(64)), "beta_fast"),
            (yarn("attention_factor", json!(-1)), "attention_factor"),
            (yarn("truncate", json!(1)), "truncate"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}),
                "rope_scaling",
            ),
            (
                json!({"rope_theta": 5000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}}),
                "rope_theta",
            ),
        ];
        for (change, key) in cases {
            assert_eq!(key_of(change.clone()), key, "{change}");
        }
        // The same twice, as files for old and new readers have it.
        let scaling = json!({"rope_type": "linear", "factor": 4.0});
        parse(json!({"rope_theta": 100, "rope_scaling": scaling, "rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 100}})).unwrap();
        // A remark of the first YaRN models.
        parse(yarn("finetuned", json!(true))).unwrap();
    }

    #[test]
    fn layers_of_two_kinds_have_two_embeddings_in_both_forms_of_the_file() {
        let full = RopeKeys { theta: 1e6, layers: Some("full_attention"), ..PLAIN };
        let local =
            RopeKeys { theta_key: "rope_local_base_freq", scaled: false, layers: Some("sliding_attention"), ..PLAIN };
        let old = json!({"rope_theta": 5e5, "rope_local_base_freq": 500,
            "rope_scaling": {"rope_type": "linear", "factor": 8}});
        let new = json!({"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500}}});
        let want = |theta: f64, factor: f32| {
            let rope = parse(json!({"rope_theta": theta})).unwrap();
            rope.inv_freq.iter().map(|f| f / factor).collect::<Vec<_>>()
        };
        for file in [old, new.clone()] {
            assert_eq!(read(&full, file.clone()).unwrap().inv_freq, want(5e5, 8.0), "{file}");
            assert_eq!(read(&local, file.clone()).unwrap().inv_freq, want(500.0, 1.0), "{file}");
        }
        assert_eq!(read(&full, json!({})).unwrap().inv_freq, want(1e6, 1.0));
        assert_eq!(
            read(&local, json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap(),
            parse(json!({})).unwrap()
        );
        let mut other = new;
        other["rope_parameters"]["chunked_attention"] = json!({});
        assert_eq!(read(&full, other).unwrap_err().key, "chunked_attention");
    }

    #[test]
    fn a_part_of_a_head_turns_where_the_family_says_so() {
        let family = RopeKeys { partial: Some(0.5), more: &["mrope_section"], ..PLAIN };
        let want = read(&RopeKeys { head_dim: 8, ..PLAIN }, json!({})).unwrap();
        for file in [
            json!({}),
            json!({"partial_rotary_factor": 0.5}),
            json!({"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [2, 2]}}),
        ] {
            assert_eq!(read(&family, file.clone()).unwrap(), want, "{file}");
        }
        for file in [
            json!({"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}}),
            json!({"partial_rotary_factor": 0.2}),
            json!({"partial_rotary_factor": 0}),
            json!({"partial_rotary_factor": -1}),
            json!({"partial_rotary_factor": 1.5}),
        ] {
            assert_eq!(read(&family, file.clone()).unwrap_err().key, "partial_rotary_factor", "{file}");
        }
    }
}
