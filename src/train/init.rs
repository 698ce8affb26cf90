//! Going on from an adapter: what it decides, and what may be said beside it.

use super::TrainConfig;
use super::effect::OF_FRESH;
use crate::adapter::{AdapterFile, Kind, layer_at, with_embedding};
use crate::error::{Error, ErrorCode, Result};
use pocketlora_models::Model;
use serde_json::Value;
use std::collections::BTreeSet;

impl TrainConfig {
    /// These settings as they are in force for a run that starts from `file`: its method and what that decides, such as rank
    /// and layers, are the adapter's. Dropout is its own as well unless it is given here, for it belongs to training. `given` tells for the
    /// key of a setting whether somebody chose it.
    ///
    /// # Errors
    /// A given setting contradicts the adapter.
    pub fn with_adapter(self, model: &dyn Model, file: &AdapterFile, given: &dyn Fn(&str) -> bool) -> Result<Self> {
        if let Some(name) = OF_FRESH.iter().find(|name| self.begins(name)) {
            let message = "the adapter that the run starts from has its ranks; leave it out, or begin without `--init`";
            return Err(Error::new(ErrorCode::Config, format!("setting `{name}`"), message));
        }
        let agree = |key: &str, same: bool, own: &str, its: &str| {
            if same || !given(key) {
                return Ok(());
            }
            let message = format!(
                "expected `{its}`, which the adapter `{}` has and `--init` keeps, got `{own}`; leave the setting out, or \
                 begin a new adapter without `--init`",
                file.dir.display()
            );
            Err(Error::new(ErrorCode::Config, format!("setting `{key}`"), message))
        };
        let (own, kind) = (self.adapter(), file.method.kind());
        agree("method", self.method == kind, self.method.name(), kind.name())?;
        let theirs = file.method.settings(own.clone());
        for key in kind.decides() {
            let (mine, its) = (own.shown(key), theirs.shown(key));
            let same = mine == its || *key == "targets" && given(key) && self.names_layers_of(model, file)?;
            agree(key, same, &mine, &its)?;
        }
        let dropout = if given("dropout") { self.dropout } else { theirs.dropout as f32 };
        let config = Self { dropout, ..self.of_method(kind, theirs) };
        config.check_effect(given)?;
        Ok(config)
    }

    /// As [`TrainConfig::with_adapter`], for settings of which nobody knows who chose them: those that are not the defaults
    /// were given.
    pub(super) fn of_adapter(self, model: &dyn Model, file: &AdapterFile) -> Result<Self> {
        let values = |config: &Self| serde_json::to_value(config).unwrap_or_default();
        let (own, default) = (values(&self), values(&Self::default()));
        self.with_adapter(model, file, &|key| own.get(key).unwrap_or(&Value::Null) != &default[key])
    }

    /// Whether the targets are the layers that the adapter has, however they are named.
    fn names_layers_of(&self, model: &dyn Model, file: &AdapterFile) -> Result<bool> {
        let names = |list: &[String]| list.iter().cloned().collect::<BTreeSet<_>>();
        if names(&self.targets) == names(file.method.targets()) {
            return Ok(true);
        }
        if file.method.kind() == Kind::LnTuning {
            return Ok(false);
        }
        let named: BTreeSet<u32> = with_embedding(model, &self.targets)?.into_iter().map(|p| p.0).collect();
        let there = file.modules().map(|path| layer_at(model, path).map(|p| p.0));
        Ok(there.collect::<Option<BTreeSet<u32>>>() == Some(named))
    }
}
