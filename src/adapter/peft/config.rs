//! `adapter_config.json`: tables say of every key what is done with it, one of the keys that all methods have and one of
//! each method.

use super::Replacements;
use super::targets::Targets;
use crate::adapter::kinds::{Kind, Method};
use crate::adapter::method::with_unnamed;
use crate::error::{Error, Result};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What is done with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::adapter) enum Use {
    /// Read below, by [`Targets`] or by the method.
    Honoured,
    /// Nothing that is computed here depends on it.
    NoEffect,
    /// Anything but its default asks for what is not done here; nothing, `false` and empty ones are defaults, too.
    Default,
}

/// A key, what is done with it, and what to do instead where that is not enough.
pub(in crate::adapter) type KeyUse = (&'static str, Use, &'static str);

pub(in crate::adapter) const MERGE: &str =
    "merge the adapter into its base with PEFT's `merge_and_unload`, and use the result as the model";
pub(in crate::adapter) const RETRAIN: &str = "train it anew without that, or use it with PEFT";

/// Methods of PEFT that are not done here, and why.
const REFUSED: &[(&str, &str)] = &[
    ("ADAMSS", "whose rows are chosen by clusters of the base's singular vectors that are not in its file"),
    ("ADAPTION_PROMPT", "whose prompt has an attention of its own in some layers"),
    ("CPT", "which needs the type of each token"),
    ("FROD", "which puts products with the base's own singular vectors in place of weights"),
    ("LILY", "which reads later tokens and other texts of a batch"),
    ("OSF", "which puts products with the base's own singular vectors in place of weights"),
    ("PEANUT", "which makes its change by a network that reads whole weights"),
    ("POLY", "whose modules are mixed anew for each task"),
    ("PSOFT", "which turns singular vectors of the base whose signs are not in its file"),
    ("RANDLORA", "whose terms have as many ranks as a layer has rows"),
    ("SHADOW", "which runs a model of its own beside the base"),
    ("UNILORA", "whose places are drawn by a generator of numpy and are not in its file"),
    ("WAVEFT", "whose terms are wavelets"),
    ("XLORA", "whose adapters are mixed by a network that reads each text twice"),
];

/// The keys that the configs of all methods have, with those that other programs add.
const COMMON: &[KeyUse] = &[
    ("auto_mapping", Honoured, ""),
    ("base_model_name_or_path", Honoured, ""),
    ("inference_mode", NoEffect, ""),
    ("modules_to_save", Honoured, ""),
    ("peft_type", Honoured, ""),
    ("peft_version", NoEffect, ""),
    ("revision", NoEffect, ""),
    ("runtime_config", NoEffect, ""),
    ("task_type", Honoured, ""),
];

/// `adapter_config.json` of `file` if it adapts the modules `adapted`, keys sorted as PEFT writes them.
pub(super) fn json(method: &Method, base: Option<&str>, replaced: &Replacements, adapted: &[String]) -> Value {
    let mut copies: Vec<&str> = replaced.whole.iter().filter(|w| w.copy).map(|w| w.module.as_str()).collect();
    copies.dedup();
    let rows: Map<String, Value> = replaced.rows.iter().map(|r| (r.module.clone(), json!(r.ids))).collect();
    let common = [
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(base)),
        ("inference_mode", json!(true)),
        ("modules_to_save", if copies.is_empty() { Value::Null } else { json!(copies) }),
        ("peft_type", json!(method.kind().peft_type())),
        ("revision", Value::Null),
        ("task_type", json!("CAUSAL_LM")),
    ];
    let common = common.into_iter().map(|(key, value)| (key.to_owned(), value));
    let sorted: BTreeMap<String, Value> = common.chain(unsaid(method, adapted)).chain(said(method.write())).collect();
    let mut config: Map<String, Value> = sorted.into_iter().collect();
    // Older versions of PEFT do not know these two.
    if replaced.ties_copies {
        config.insert("ensure_weight_tying".to_owned(), true.into());
    }
    let kind = method.kind();
    if kind == Kind::TrainableTokens {
        // It has no such key, and says by itself which rows there are.
        config.remove("modules_to_save");
    } else if !rows.is_empty() {
        config.insert("trainable_token_indices".to_owned(), rows.into());
    }
    let biases = || replaced.whole.iter().filter(|w| !w.copy && w.kind == "bias");
    if config.contains_key("bias") && biases().next().is_some() {
        let own = biases().all(|w| adapted.contains(&w.module));
        config.insert("bias".to_owned(), if own { "lora_only" } else { "all" }.into());
    }
    if config.get("prompt_tuning_init").is_some_and(|init| init == "TEXT") {
        // PEFT wants a tokenizer named where a text is.
        config.insert("tokenizer_name_or_path".to_owned(), json!(base.unwrap_or(".")));
    }
    config.into()
}

/// The keys and values of an object.
fn said(config: Value) -> Map<String, Value> {
    if let Value::Object(keys) = config { keys } else { Map::new() }
}

/// What the config of `method` says with most methods, of the keys that this one has; it adapts the modules `adapted`.
fn unsaid(method: &Method, adapted: &[String]) -> impl Iterator<Item = (String, Value)> {
    let usual = [
        ("alpha_pattern", json!({})),
        ("bias", json!("none")),
        ("exclude_modules", Value::Null),
        ("fan_in_fan_out", json!(false)),
        ("init_weights", json!(true)),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", Value::Null),
        ("module_dropout", json!(0.0)),
        ("rank_dropout", json!(0.0)),
        ("rank_pattern", json!({})),
        ("target_modules", json!(with_unnamed(method.targets(), adapted))),
    ];
    let kind = method.kind();
    let has = move |key: &str| kind.keys().iter().any(|(k, ..)| *k == key);
    // Older versions of PEFT read LoRA's configs, too, and do not know this key.
    let is_old = move |key: &str| kind.peft_type() == Kind::Lora.peft_type() && key == "exclude_modules";
    usual.into_iter().filter(move |(key, _)| has(key) && !is_old(key)).map(|(key, value)| (key.to_owned(), value))
}

/// A config as it was read.
#[derive(Debug)]
pub(super) struct Parsed {
    pub method: Method,
    /// The base model's name or path.
    pub base: Option<String>,
    /// Which layers it adapts.
    pub targets: Targets,
    /// Modules of which the file has a whole copy.
    pub modules_to_save: Vec<String>,
    /// A tied head follows a copy of the embedding.
    pub ties_copies: bool,
    /// Ids whose rows of an embedding are replaced, by the end of the embedding's path.
    pub rows: Vec<(String, Vec<u32>)>,
    /// It trained biases, too.
    pub biases: bool,
    /// The class of the model that it was trained on, such as `Qwen2ForCausalLM`.
    pub base_class: Option<String>,
    /// What the user should know though it stops nothing.
    pub warnings: Vec<String>,
}

/// Reads the config `json` of the file at `path`.
///
/// # Errors
/// It asks for what is not done here, or a value is out of range.
pub(super) fn parse(path: &Path, json: &Map<String, Value>) -> Result<Parsed> {
    let mut keys = Keys { path, json, own: &[] };
    let kind = match keys.get("peft_type").and_then(Value::as_str) {
        Some(name) => Kind::of_peft(name, &|key| json.get(key).is_some_and(asks)).ok_or_else(|| {
            let what = match REFUSED.iter().find(|(refused, _)| *refused == name) {
                Some((_, why)) => format!("adapter method `{name}`, {why},"),
                None => format!("adapter method `{name}`"),
            };
            Error::unsupported(path, what, "merge it into its base with PEFT, where that can be, or train another one")
        })?,
        None => return Err(keys.wrong("peft_type", "the name of an adapter method")),
    };
    keys.own = kind.keys();
    keys.check_table()?;
    let method = kind.read(&keys)?;
    // Trained biases lie in the file under their own names and are used by them.
    let biases = match keys.text("bias")?.as_deref() {
        // Those of norms are trained with them.
        None if kind == Kind::LnTuning => true,
        None | Some("none") => false,
        Some("all" | "lora_only") => true,
        Some(_) => return Err(keys.wrong("bias", "`none`, `all` or `lora_only`")),
    };
    let mut warnings = Vec::new();
    if let Some(task) = keys.text("task_type")?.filter(|task| task != "CAUSAL_LM") {
        warnings.push(format!("the adapter was trained for the task `{task}`, not for writing text"));
    }
    Ok(Parsed {
        method,
        base: keys.text("base_model_name_or_path")?,
        targets: Targets::new(&keys)?,
        modules_to_save: keys.list("modules_to_save")?,
        ties_copies: keys.flag("ensure_weight_tying")?,
        rows: match kind {
            Kind::TrainableTokens => keys.rows_of_targets()?,
            _ => keys.rows()?,
        },
        biases,
        base_class: keys.base_class()?,
        warnings,
    })
}

/// Bound on whole numbers: far beyond any use, and small enough that hostile files cannot ask for absurd work.
const MOST: usize = 1 << 16;

/// In place of a file's path: keys that somebody gave for a fresh adapter.
const SETTINGS: &str = "settings of the adapter";

/// A config's keys, with what is said where one is wrong.
pub(in crate::adapter) struct Keys<'a> {
    pub path: &'a Path,
    json: &'a Map<String, Value>,
    /// The method's table.
    own: &'static [KeyUse],
}

impl<'a> Keys<'a> {
    /// Keys of a fresh adapter's settings.
    pub fn of_settings(json: &'a Map<String, Value>, own: &'static [KeyUse]) -> Self {
        Self { path: Path::new(SETTINGS), json, own }
    }

    /// Keys of the config `json` at `path`, all of which `own` knows.
    ///
    /// # Errors
    /// One asks for what is not done here.
    pub(super) fn new(path: &'a Path, json: &'a Map<String, Value>, own: &'static [KeyUse]) -> Result<Self> {
        let keys = Self { path, json, own };
        keys.check_table().map(|()| keys)
    }

    /// The whole number that `key` has, from `least` on.
    ///
    /// # Errors
    /// It is none, or below.
    pub fn whole(&self, key: &str, least: usize, default: usize) -> Result<usize> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (least..=MOST).contains(n));
        number.ok_or_else(|| self.wrong(key, &format!("a whole number from {least} to {MOST}")))
    }

    /// The value of `key` if there is one. Of a method that does not have the key, there is none.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let used = self.find(key)?;
        debug_assert!(used == Honoured, "`{key}` is read, and its table says `{used:?}`");
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn find(&self, key: &str) -> Option<Use> {
        self.own.iter().chain(COMMON).find(|(k, ..)| *k == key).map(|(_, used, _)| *used)
    }

    pub fn wrong(&self, key: &str, expected: &str) -> Error {
        if self.path == Path::new(SETTINGS) {
            return Error::config(key, expected, self.get(key).unwrap_or(&Value::Null));
        }
        let got = self.get(key).map_or_else(|| "nothing".to_owned(), |v| format!("`{v}`"));
        Error::format(self.path, format!("key `{key}`"), expected, got)
    }

    /// Every key is in the table, and has its default where that is all there is; of others, nothing is asked.
    fn check_table(&self) -> Result<()> {
        for (key, value) in self.json.iter().filter(|(_, v)| asks(v)) {
            let next = match self.own.iter().chain(COMMON).find(|(k, ..)| k == key) {
                Some((_, OnlyDefault, next)) => next,
                Some((_, Honoured | NoEffect, _)) => continue,
                None => "remove the key if you know that it changes nothing, or merge the adapter with PEFT",
            };
            let shown = value.to_string();
            let shown = shown.char_indices().nth(80).map_or(shown.as_str(), |(end, _)| &shown[..end]);
            return Err(Error::unsupported(self.path, format!("key `{key}` with the value `{shown}`"), next));
        }
        Ok(())
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        self.get(key).map_or(Ok(false), |v| v.as_bool().ok_or_else(|| self.wrong(key, "true or false")))
    }

    pub fn text(&self, key: &str) -> Result<Option<String>> {
        let text = |v: &Value| v.as_str().map(str::to_owned).ok_or_else(|| self.wrong(key, "a text"));
        self.get(key).map(text).transpose()
    }

    pub fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match self.get(key) {
            None => default.ok_or_else(|| self.wrong(key, "a number")),
            Some(v) => v.as_f64().filter(|n| n.is_finite()).ok_or_else(|| self.wrong(key, "a finite number")),
        }
    }

    /// A list of names; one alone is a list, too.
    pub fn list(&self, key: &str) -> Result<Vec<String>> {
        let name = |v: &Value| v.as_str().map(str::to_owned);
        let names = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(name).collect(),
            Some(one) => name(one).map(|one| vec![one]),
        };
        names.ok_or_else(|| self.wrong(key, "a list of names"))
    }

    pub fn patterns(&self, key: &str) -> Result<Vec<(String, f64)>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let map = value.as_object().ok_or_else(|| self.wrong(key, "an object of numbers"))?;
        let number = |v: &Value| v.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        map.iter()
            .map(|(k, v)| Ok((k.clone(), number(v).ok_or_else(|| self.wrong(key, "an object of positive numbers"))?)))
            .collect()
    }

    /// `base_model_class` of `auto_mapping`, which PEFT writes where it is not told a task.
    fn base_class(&self) -> Result<Option<String>> {
        let key = "auto_mapping";
        let Some(value) = self.get(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong(key, "an object"))?;
        Ok(map.get("base_model_class").and_then(Value::as_str).map(str::to_owned))
    }

    /// A list of token ids.
    pub fn ids(&self, key: &str) -> Result<Vec<u32>> {
        self.get(key).map_or(Ok(Vec::new()), |list| self.ids_in(key, list))
    }

    fn ids_in(&self, key: &str, list: &Value) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = list.as_array().and_then(|list| list.iter().map(id).collect());
        ids.ok_or_else(|| self.wrong(key, "token ids"))
    }

    /// `token_indices` of the one embedding in `target_modules`.
    fn rows_of_targets(&self) -> Result<Vec<(String, Vec<u32>)>> {
        let (key, ids) = ("target_modules", self.ids("token_indices")?);
        match &self.list(key)?[..] {
            [] => Ok(vec![("embed_tokens".to_owned(), ids)]),
            [one] => Ok(vec![(one.clone(), ids)]),
            _ => Err(self.wrong(key, "one embedding")),
        }
    }

    /// `trainable_token_indices`: ids, of the embedding unless it is said of what.
    fn rows(&self) -> Result<Vec<(String, Vec<u32>)>> {
        let key = "trainable_token_indices";
        let ids = |v: &Value| self.ids_in(key, v);
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map.iter().map(|(name, v)| Ok((name.clone(), ids(v)?))).collect(),
            Some(list) => Ok(vec![("embed_tokens".to_owned(), ids(list)?)]),
        }
    }
}

/// Whether a value is more than nothing.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

/// The value of the first pattern that matches `module`: PEFT reads keys as regular expressions for the end of a path.
pub(in crate::adapter) struct Patterns<'a> {
    compiled: Vec<(fancy_regex::Regex, &'a str, f64)>,
    path: &'a Path,
}

impl<'a> Patterns<'a> {
    pub fn new(path: &'a Path, patterns: &'a [(String, f64)]) -> Result<Self> {
        let one = |(key, value): &'a (String, f64)| {
            Ok((regex(path, key, &format!(r"^(?:.*\.)?(?:{key})$"))?, key.as_str(), *value))
        };
        Ok(Self { compiled: patterns.iter().map(one).collect::<Result<_>>()?, path })
    }

    /// Keys that match none of `modules`, each with all its names.
    pub fn idle(&self, modules: &[[&str; 2]]) -> Result<Vec<&'a str>> {
        let mut idle = Vec::new();
        for (regex, key, _) in &self.compiled {
            let found: Vec<bool> =
                modules.iter().map(|names| matches_any(self.path, regex, key, *names)).collect::<Result<_>>()?;
            if !found.contains(&true) {
                idle.push(*key);
            }
        }
        Ok(idle)
    }

    /// Of the first pattern that matches one of `names`, which are names of one module.
    pub fn value_for(&self, names: [&str; 2]) -> Result<Option<f64>> {
        for (regex, key, value) in &self.compiled {
            if matches_any(self.path, regex, key, names)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}

/// The regular expression `full`, made of the pattern `key` of the config at `path`.
pub(in crate::adapter) fn regex(path: &Path, key: &str, full: &str) -> Result<fancy_regex::Regex> {
    fancy_regex::Regex::new(full)
        .map_err(|e| Error::format(path, format!("pattern `{key}`"), "a regular expression", &e))
}

/// Whether one of a module's names matches.
///
/// # Errors
/// The search takes longer than any pattern of use.
pub(in crate::adapter) fn matches_any(
    path: &Path,
    regex: &fancy_regex::Regex,
    key: &str,
    names: [&str; 2],
) -> Result<bool> {
    for name in names {
        let found = regex.is_match(name);
        if found.map_err(|e| Error::format(path, format!("pattern `{key}`"), "one that can be matched", &e))? {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Lora;

    fn parse_with(changes: &Value) -> Result<Parsed> {
        let mut config = json(&Method::Lora(Lora::new(4, 8.0)), None, &Replacements::default(), &[]);
        let map = config.as_object_mut().unwrap();
        map.extend(changes.as_object().unwrap().clone());
        parse(Path::new("adapter_config.json"), map)
    }

    #[test]
    fn the_common_table_is_sorted_and_no_method_has_its_keys_again() {
        assert!(COMMON.windows(2).all(|w| w[0].0 < w[1].0));
        for kind in Kind::ALL {
            let again = kind.keys().iter().find(|(key, ..)| COMMON.iter().any(|(common, ..)| common == key));
            assert_eq!(again, None, "{}", kind.name());
        }
    }

    #[test]
    fn what_peft_writes_by_default_is_read() {
        // As `LoraConfig().to_dict()` of PEFT 0.21 has it, with what other programs add.
        parse_with(&json!({
            "alora_invocation_tokens": null, "arrow_config": null, "corda_config": null, "ensure_weight_tying": false,
            "eva_config": null, "exclude_modules": null, "kasa_config": null, "layer_replication": null,
            "loftq_config": {}, "lora_bias": false, "lora_ga_config": null, "megatron_config": null,
            "megatron_core": "megatron.core", "modules_to_save": [], "monteclora_config": null,
            "peft_version": "0.21.2", "qalora_group_size": 16, "target_parameters": null,
            "trainable_token_indices": null, "use_bdlora": null, "use_qalora": false, "velora_config": null,
            "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": true},
            "revision": "main", "lora_dtype": "AUTO", "a_key_of_tomorrow": null, "and_another": false,
        }))
        .unwrap();
    }

    #[test]
    fn what_changes_the_computation_is_refused_by_name() {
        for (key, value) in [
            ("arrow_config", json!({"top_k": 3})),
            ("kasa_config", json!({"beta": 1e-4})),
            ("layer_replication", json!([[0, 2], [1, 2]])),
            ("megatron_config", json!({"tensor_model_parallel_size": 2})),
            ("use_bdlora", json!({"nblocks": 3})),
            ("use_qalora", json!(true)),
            ("a_key_of_tomorrow", json!(0.5)),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("init_lora_weights", json!("olora")),
            ("init_lora_weights", json!("an_idea_of_tomorrow")),
            ("init_lora_weights", json!(7)),
            ("bias", json!("some")),
            ("use_rslora", json!("true")),
            ("lora_dropout", json!(1.5)),
            ("rank_pattern", json!({"q_proj": 2.5})),
            ("target_modules", json!([1, 2])),
            ("modules_to_save", json!({"lm_head": 1})),
            ("trainable_token_indices", json!(["x"])),
            ("layers_to_transform", json!("all")),
        ] {
            let error = parse_with(&json!({ key: value })).map(|_| ()).expect_err(key).to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn methods_that_are_not_done_are_refused_with_the_reason() {
        for (name, why) in REFUSED {
            let error = parse_with(&json!({"peft_type": name})).map(|_| ()).expect_err(name).to_string();
            assert!(error.contains(&format!("`{name}`, {why}")) && error.contains("merge"), "{error}");
        }
    }

    #[test]
    fn another_task_is_spoken_of() {
        assert!(parse_with(&json!({"task_type": "SEQ_CLS"})).unwrap().warnings[0].contains("SEQ_CLS"));
        assert!(parse_with(&json!({"task_type": null})).unwrap().warnings.is_empty());
    }
}
