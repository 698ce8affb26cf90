//! Opening models.

use crate::failure::Failure;
use crate::handles::{Held, cancel, engine, hold};
use crate::{longs, native, optional, text};
use jni::objects::{JDoubleArray, JFloatArray, JLongArray, JString};
use pocketlora::{Cancel, Engine, Error, Estimate, Options, Pooling, Precision, TrainConfig};
use serde::Deserialize;
use std::path::Path;

/// What Kotlin's `Options` become.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    threads: usize,
    precision: String,
    context: usize,
    int8_cache: bool,
    strict: bool,
    cache_dir: Option<String>,
    base_name: Option<String>,
    memory_budget: Option<u64>,
}

impl Given {
    fn parse(json: &str) -> Result<Options, Failure> {
        let given: Self = parse("options", json)?;
        let precision = match given.precision.as_str() {
            "exact" => Precision::Exact,
            "bf16" => Precision::Bf16,
            "fast" => Precision::Fast,
            other => return Err(Error::config("precision", "`exact`, `bf16` or `fast`", other).into()),
        };
        let mut options = Options::new()
            .threads(given.threads)
            .precision(precision)
            .context(given.context)
            .int8_cache(given.int8_cache)
            .strict(given.strict);
        options.cache_dir = given.cache_dir.map(Into::into);
        options.base_name = given.base_name;
        options.memory_budget = given.memory_budget;
        Ok(options)
    }
}

/// Settings of Kotlin's, which writes them itself.
pub fn parse<'a, T: Deserialize<'a>>(name: &str, json: &'a str) -> Result<T, Failure> {
    Ok(serde_json::from_str(json).map_err(|e| Error::config(name, "settings of this version", e))?)
}

native!(Java_io_pocketlora_Native_estimate(
    env, path: JString<'local>, options: JString<'local>, training: JString<'local>,
) -> JLongArray<'local> {
    let (path, options, training) = (text(env, &path)?, text(env, &options)?, optional(env, &training)?);
    let config = training.map(|json| TrainConfig::parse(&json)).transpose()?;
    let found = Estimate::of(Path::new(&path), &Given::parse(&options)?, config.as_ref())?;
    let values = [
        found.parameters, found.context_tokens, found.mapped, found.opened, found.per_1000_tokens, found.full_chat,
        found.training,
    ];
    longs(env, &values.map(|value| value as i64))
});

native!(Java_io_pocketlora_Native_engineOpen(env, path: JString<'local>, options: JString<'local>) -> i64 {
    let (path, options) = (text(env, &path)?, text(env, &options)?);
    Ok(hold(Held::Engine(Engine::open(Path::new(&path), &Given::parse(&options)?)?)))
});

native!(Java_io_pocketlora_Native_engineInfo(env, handle: i64) -> JLongArray<'local> {
    let engine = engine(handle)?;
    let anonymous = pocketlora::memory::anonymous_bytes().unwrap_or(0);
    longs(env, &[engine.context_tokens() as i64, engine.mapped_bytes() as i64, anonymous as i64])
});

native!(Java_io_pocketlora_Native_recommended(env, handle: i64) -> JDoubleArray<'local> {
    let sampling = engine(handle)?.recommended()?.sampling;
    let dry = sampling.dry;
    let values = [
        f64::from(sampling.temperature), sampling.top_k as f64, f64::from(sampling.top_p), f64::from(sampling.min_p),
        f64::from(sampling.repetition_penalty), f64::from(dry.multiplier), f64::from(dry.base),
        dry.allowed_length as f64, dry.after as f64,
    ];
    let array = JDoubleArray::new(env, values.len())?;
    array.set_region(env, 0, &values)?;
    Ok(array)
});

native!(Java_io_pocketlora_Native_embed(
    env, handle: i64, what: JString<'local>, last: bool, token: i64,
) -> JFloatArray<'local> {
    let what = text(env, &what)?;
    let pooling = if last { Pooling::Last } else { Pooling::Mean };
    let values = engine(handle)?.embed(&what, pooling, &cancel(token)?)?;
    let array = JFloatArray::new(env, values.len())?;
    array.set_region(env, 0, &values)?;
    Ok(array)
});

native!(Java_io_pocketlora_Native_cancelNew(_env) -> i64 {
    Ok(hold(Held::Cancel(Cancel::new())))
});

native!(Java_io_pocketlora_Native_cancel(_env, token: i64) -> () {
    // A token that is gone is of work that has ended.
    if let Ok(token) = cancel(token) {
        token.cancel();
    }
    Ok(())
});
