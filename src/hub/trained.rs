//! What models in the cache are, and which adapters were trained on them: those in the cache, and those that `train` wrote
//! elsewhere, of which the cache keeps the places.

use super::{Hub, Item, Kind};
use crate::error::{Error, Result};
use crate::format::foreign::read_object;
use crate::format::gguf::Gguf;
use crate::format::{Source as _, is_gguf, write_bytes};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The file with the places, one a line.
const FILE: &str = "trained";
const CONFIG: &str = "adapter_config.json";

impl Hub {
    /// Notes that an adapter was trained into the folder `dir`, so that [`Hub::adapters_of`] finds it.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub fn note_trained(&self, dir: &Path) -> Result<()> {
        let full = dir.canonicalize().map_err(|e| Error::io("find", dir, e))?;
        // A place that a line cannot hold is not kept.
        let Some(line) = full.to_str().filter(|line| !line.contains('\n')) else { return Ok(()) };
        let mut places: BTreeSet<String> = self.places().into_iter().filter(|p| is_adapter(Path::new(p))).collect();
        if !places.insert(line.to_owned()) {
            return Ok(());
        }
        self.create(&self.home)?;
        let text: String = places.iter().map(|place| format!("{place}\n")).collect();
        write_bytes(&self.home.join(FILE), text.as_bytes())
    }

    fn places(&self) -> Vec<String> {
        let text = fs::read_to_string(self.home.join(FILE)).unwrap_or_default();
        text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// Of `items`, which are all that the cache holds, the adapters that name `model` as their base, and those that were
    /// trained here on it, wherever they are now.
    #[must_use]
    pub fn adapters_of(&self, model: &Item, items: &[Item]) -> Vec<PathBuf> {
        if model.kind != Kind::Model {
            return Vec::new();
        }
        let cached = items.iter().filter_map(|item| match item.kind {
            Kind::Adapter => item.source.clone(),
            Kind::Demo => Some(item.path.join("adapter")),
            _ => None,
        });
        let all: BTreeSet<PathBuf> = cached.chain(self.places().into_iter().map(PathBuf::from)).collect();
        let mut names = vec![model.name.clone(), self.base_name(&model.name)];
        names.extend([Some(&model.path), model.source.as_ref()].into_iter().flatten().map(|p| p.display().to_string()));
        let on_it = |dir: &PathBuf| {
            let config = read_object(&dir.join(CONFIG)).ok();
            let base = config.as_ref().and_then(|c| c.get("base_model_name_or_path")).and_then(Value::as_str);
            base.is_some_and(|base| names.iter().any(|name| name == base))
        };
        all.into_iter().filter(on_it).collect()
    }
}

impl Item {
    /// The family of a model, as its config names it: `model_type`.
    #[must_use]
    pub fn family(&self) -> Option<String> {
        let at = match self.kind {
            Kind::Model => self.source.as_ref()?,
            Kind::Quantized => &self.path,
            _ => return None,
        };
        let of = |config: &serde_json::Map<String, Value>| config.get("model_type")?.as_str().map(str::to_owned);
        if is_gguf(at) { of(Gguf::open(at).ok()?.config()) } else { of(&read_object(&at.join("config.json")).ok()?) }
    }
}

fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}
