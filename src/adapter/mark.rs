//! A mark of the base that an adapter was trained on, kept in the adapter's file: some numbers of its embedding, and a
//! hash of its content (`content.rs`). An embedding is the same whether the rest is quantized or not, and nearly the same
//! after further training, but that of another model has nothing to do with it: such a base is refused. The hash tells
//! the rest apart, which may still be meant: it is spoken of, and refused where somebody asks for that.

use super::{AdapterFile, content};
use crate::base::Base;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Config, Model, Param, Role};
use serde::{Deserialize, Serialize};

/// Rows and columns that are looked at.
const SAMPLES: usize = 8;
/// Cosine between two marks below which they are of different models: 4-bit rounding leaves 0.99, chance gives 0.1.
const ALIKE: f64 = 0.5;

/// What is kept, as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    /// `model_type`.
    family: String,
    layers: usize,
    hidden: usize,
    /// Tokens whose rows are looked at.
    rows: Vec<u32>,
    /// Columns 0, hidden / 8, .. of each.
    values: Vec<f32>,
    /// Of the content; files of earlier versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hash: Option<String>,
}

/// The mark of `base`.
///
/// # Errors
/// Out of memory, device lost.
pub(crate) fn of<B: Backend>(base: &Base<B>) -> Result<String> {
    let config = base.model.config();
    let rows = (0..SAMPLES).map(|i| ((2 * i + 1) * config.vocab_size / (2 * SAMPLES)) as u32).collect();
    let mut mark = mark_of(config, rows, &mut |rows| embedded(base, rows))?;
    mark.hash = content_of(base)?;
    Ok(serde_json::to_string(&mark).expect("plain data serializes"))
}

/// Reads rows of an embedding.
pub(super) type ReadRows<'a> = dyn FnMut(&[u32]) -> Result<Vec<f32>> + 'a;

/// Refuses an adapter that was trained on another model than `base`, as far as its file tells.
///
/// # Errors
/// It was; as [`of`].
pub(crate) fn check<B: Backend>(base: &Base<B>, file: &AdapterFile) -> Result<()> {
    check_read(base.model.config(), file, &mut |ids| embedded(base, ids))
}

/// As [`check`], for the model with `config` and the embedding that `read` reads.
///
/// # Errors
/// As there; those of `read`.
pub(super) fn check_read(config: &Config, file: &AdapterFile, read: &mut ReadRows<'_>) -> Result<()> {
    let Some(mark) = &file.base_mark else { return Ok(()) };
    let Some(other) = differs(mark, config, read)? else { return Ok(()) };
    let name = file.base.as_ref().map_or(String::new(), |name| format!(" (`{name}`)"));
    let message =
        format!("expected the base{name} that the adapter was trained on, {other}; give that model with `-m`");
    Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", file.dir.display()), message))
}

/// Whether `mark` may be of `base`, or why not. What cannot be read says nothing.
fn differs(mark: &str, config: &Config, read: &mut ReadRows<'_>) -> Result<Option<String>> {
    let Ok(mark) = serde_json::from_str::<Mark>(mark) else { return Ok(None) };
    let shape = |layers, hidden| format!("{layers} layers of {hidden}");
    let (old, new) = (shape(mark.layers, mark.hidden), shape(config.layers, config.hidden_size));
    if mark.family != config.model_type || old != new {
        let (family, kind) = (&mark.family, &config.model_type);
        return Ok(Some(format!("a `{family}` of {old}, got a `{kind}` of {new}")));
    }
    let known = mark.rows.iter().all(|&row| (row as usize) < config.vocab_size) && mark.rows.len() == SAMPLES;
    let here = if known { mark_of(config, mark.rows.clone(), read)?.values } else { Vec::new() };
    if here.len() != mark.values.len() {
        return Ok(None);
    }
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let norms = (dot(&here, &here) * dot(&mark.values, &mark.values)).sqrt();
    let alike = norms == 0.0 || !norms.is_finite() || dot(&here, &mark.values) >= ALIKE * norms;
    Ok((!alike).then(|| format!("another `{}` of {old}: its embedding is not this one's", mark.family)))
}

fn mark_of(config: &Config, rows: Vec<u32>, read: &mut ReadRows<'_>) -> Result<Mark> {
    let hidden = config.hidden_size;
    let all = read(&rows)?;
    let column = |i: usize| i * hidden / SAMPLES;
    let values = all.chunks(hidden).flat_map(|row| (0..SAMPLES).map(|i| row[column(i)])).collect();
    Ok(Mark { family: config.model_type.clone(), layers: config.layers, hidden, rows, values, hash: None })
}

/// The hash of the base that `file` was trained on, where the file tells it.
pub(crate) fn hash_in(file: &AdapterFile) -> Option<String> {
    serde_json::from_str::<Mark>(file.base_mark.as_ref()?).ok()?.hash
}

/// Why `one` and `other` are for different bases, if their files tell that they are.
pub(super) fn apart(one: &AdapterFile, other: &AdapterFile) -> Option<String> {
    let mark = |file: &AdapterFile| serde_json::from_str::<Mark>(file.base_mark.as_ref()?).ok();
    let (one, other) = (mark(one)?, mark(other)?);
    let shown = |mark: &Mark| format!("a `{}` of {} layers of {}", mark.family, mark.layers, mark.hidden);
    if shown(&one) != shown(&other) {
        return Some(format!("{} and {}", shown(&one), shown(&other)));
    }
    let way = |hash: &str| hash.split_once(':').map(|(way, _)| way.to_owned());
    let (one, other) = (one.hash?, other.hash?);
    let differ = one != other && way(&one) == way(&other);
    differ.then(|| format!("content hashes `{one}` and `{other}`"))
}

/// That `file` was trained on other weights than those of `base`, in words, if its file says so.
///
/// # Errors
/// As [`of`].
pub(crate) fn doubt<B: Backend>(base: &Base<B>, file: &AdapterFile) -> Result<Option<String>> {
    match hash_in(file) {
        Some(old) => Ok(another(&old, content_of(base)?.as_deref())),
        None => Ok(None),
    }
}

/// As [`doubt`], for `model` whose parameters `read` reads.
///
/// # Errors
/// Those of `read`.
pub(super) fn doubt_read(
    model: &dyn Model,
    file: &AdapterFile,
    read: &mut content::ReadRows<'_>,
) -> Result<Option<String>> {
    match hash_in(file) {
        Some(old) => Ok(another(&old, content::hash(model.params(), read)?.as_deref())),
        None => Ok(None),
    }
}

/// What is to be said of an adapter for the base with the hash `old` on that with the hash `new`. Hashes that later
/// versions make in another way say nothing.
fn another(old: &str, new: Option<&str>) -> Option<String> {
    let (way, here) = (|hash: &str| hash.split_once(':').map(|(way, _)| way.to_owned()), new?);
    (old != here && way(old) == way(here)).then(|| {
        format!(
            "it was trained on other weights of this shape (content hash `{old}`, here `{here}`): another quantization \
             of the model, such as a GGUF file, or the model before or after further training"
        )
    })
}

/// The hash of what `base` holds.
///
/// # Errors
/// As [`of`].
pub(crate) fn content_of<B: Backend>(base: &Base<B>) -> Result<Option<String>> {
    content::hash(base.model.params(), &mut |number, rows| {
        let ids: Vec<u32> = rows.map(|row| row as u32).collect();
        let param = Param(number as u32);
        rows_of(base, param, &ids, base.backend.shape(base.matrix(param)).1)
    })
}

/// The rows `ids` of the embedding of `base`.
pub(super) fn embedded<B: Backend>(base: &Base<B>, ids: &[u32]) -> Result<Vec<f32>> {
    let table = base.model.params().iter().position(|p| p.role == Role::Embedding);
    let table = Param(table.expect("every language model has an embedding") as u32);
    rows_of(base, table, ids, base.model.config().hidden_size)
}

/// The rows `ids` of a matrix of `cols` columns.
fn rows_of<B: Backend>(base: &Base<B>, matrix: Param, ids: &[u32], cols: usize) -> Result<Vec<f32>> {
    let backend = &base.backend;
    let mut buffer = backend.buffer(ids.len() * cols)?;
    backend.run(Call::Embed { table: base.matrix(matrix), ids, y: &mut buffer })?;
    let mut all = vec![0.0; ids.len() * cols];
    backend.read(&buffer, &mut all)?;
    Ok(all)
}
