//! Whether a model in another form is worth converting: asked before any work, so that nothing is made that cannot run.

use crate::base::check_source;
use crate::error::{Error, Result};
use crate::format::Source;
use crate::text::open_text;
use crate::tokenizer::SpecialText;
use std::fs;
use std::path::Path;

/// Checks that what [`quantize`](crate::format::quantize) makes of `source`, which lies at `path`, could be opened.
/// Weights are not read.
///
/// # Errors
/// The model is of a family that does not run, its config is impossible, its weights are not the family's, or its
/// tokenizer or chat template is broken.
pub fn check_import(source: &dyn Source, path: &Path) -> Result<()> {
    check_source(source, path)?;
    check_text(source, path)
}

/// Opens what would lie beside the weights, as the model's users will.
fn check_text(source: &dyn Source, path: &Path) -> Result<()> {
    if path.is_dir() {
        return open_text(path, SpecialText::Auto).map(|_| ());
    }
    // A GGUF file's are made of its metadata, and so have no folder yet.
    let dir = tempfile::tempdir().map_err(|e| Error::io("create a temporary folder beside", path, e))?;
    let mut files = source.sidecars()?.files;
    files.push(("config.json".to_owned(), serde_json::to_vec(source.config()).unwrap_or_default()));
    for (name, content) in files {
        fs::write(dir.path().join(&name), content).map_err(|e| Error::io("write", &dir.path().join(&name), e))?;
    }
    open_text(dir.path(), SpecialText::Auto).map(|_| ()).map_err(|e| e.moved(dir.path(), path))
}
