//! Whether a model can run, asked before its weights are touched.

use crate::error::{Error, ErrorCode, Result};
use crate::format::{Checkpoint, Source, foreign, weight_of};
use pocketlora_models::Model;
use serde_json::{Map, Value};
use std::collections::HashSet;
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
    let names: HashSet<&str> = source.tensors().iter().map(|t| t.name.as_str()).collect();
    // In the file's order, so that messages do not differ from run to run.
    check_names(&*model, place, source.tensors().iter().map(|t| t.name.as_str()))?;
    match model.params().iter().find(|spec| !names.contains(spec.name.as_str())) {
        None => Ok(()),
        Some(spec) => Err(crate::format::safetensors::missing(place, &spec.name)),
    }
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
    let known: HashSet<&str> = model.params().iter().map(|spec| spec.name.as_str()).collect();
    foreign::check_names(place, names, model.config().layers, |name| known.contains(name))
}
