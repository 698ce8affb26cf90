//! Whether a model can run, asked before its weights are touched.

use crate::error::{Error, ErrorCode, Result};
use crate::format::{Checkpoint, Source, TensorMeta, foreign, weight_of};
use pocketlora_models::{Model, ParamSpec, Role};
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// The architecture that the checkpoint's config names, once it is known to have a use for every weight.
///
/// # Errors
/// The family is not among ours, a key of the config cannot be, or a weight has no place in the model.
pub(crate) fn architecture(checkpoint: &Checkpoint) -> Result<Box<dyn Model>> {
    let model = architecture_of(checkpoint.config(), checkpoint.dir())?;
    let names = checkpoint.names().filter(|name| weight_of(name) == *name || !checkpoint.contains(weight_of(name)));
    check_names(&*model, checkpoint.dir(), names)?;
    Ok(model)
}

/// Checks that what would be made of `source`, which lies at `place`, could run: family, config, and that the weights are
/// the family's, all of them and no other.
///
/// # Errors
/// It could not.
pub(crate) fn check_source(source: &dyn Source, place: &Path) -> Result<()> {
    let model = architecture_of(source.config(), place)?;
    check_names(&*model, place, source.tensors().iter().map(|t| t.name.as_str()))?;
    let metas: HashMap<&str, (usize, &TensorMeta)> =
        source.tensors().iter().enumerate().map(|(i, t)| (&t.name[..], (i, t))).collect();
    for spec in model.params() {
        match metas.get(spec.name.as_str()) {
            Some((index, meta))
                if meta.shape == if source.by_rows(*index) { spec.shape.clone() } else { spec.stored() } => {}
            Some((_, meta)) => return Err(wrong_shape(place, spec, &meta.shape)),
            None => return Err(crate::format::safetensors::missing(place, &spec.name)),
        }
    }
    Ok(())
}

/// The error for a weight of `shape` at `place` that is to be `spec`.
pub(super) fn wrong_shape(place: &Path, spec: &ParamSpec, shape: &[usize]) -> Error {
    let next = match (spec.role, shape) {
        // A vocabulary that grew or was cut, with the config left behind.
        (Role::Embedding | Role::Head, [rows, cols]) if *cols == spec.shape[1] => {
            format!("if the vocabulary was resized, set `vocab_size` to {rows}")
        }
        _ => "config and weights belong to different models: use both from one place".to_owned(),
    };
    let message = format!("expected shape `{:?}` from config.json, got `{shape:?}`; {next}", spec.stored());
    Error::new(ErrorCode::Format, format!("`{}`: tensor `{}`", place.display(), spec.name), message)
}

/// The architecture that `config` names, of a model that lies at `place`.
///
/// # Errors
/// The family is not among ours, or a key cannot be.
pub(crate) fn architecture_of(config: &Map<String, Value>, place: &Path) -> Result<Box<dyn Model>> {
    pocketlora_models::build(config).map_err(|e| {
        let place = format!("`{}`", place.join("config.json").display());
        if e.unsupported {
            let next = "such a model is not supported; use one that is, as `pocketlora pull --list` shows some";
            Error::new(ErrorCode::Unsupported, place, format!("{e}; {next}"))
        } else {
            let next = "correct the key, or take config.json from where the model came from";
            Error::new(ErrorCode::Format, place, format!("{e}; {next}"))
        }
    })
}

fn check_names<'a>(model: &dyn Model, place: &Path, names: impl Iterator<Item = &'a str>) -> Result<()> {
    let ignored = model.outline().ignored.iter().map(String::as_str);
    let known: HashSet<&str> = model.params().iter().map(|spec| spec.name.as_str()).chain(ignored).collect();
    foreign::check_names(place, names, model.config().layers, |name| known.contains(name))
}
