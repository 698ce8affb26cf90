//! Going on from an adapter: what it decides, and what may be said beside it.

use super::TrainConfig;
use super::setup::target_modules;
use crate::adapter::AdapterFile;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_models::ParamSpec;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Display;

impl TrainConfig {
    /// These settings as they are in force for a run that starts from `file`: rank, alpha, layers and the kind of scale are
    /// the adapter's. Dropout is its own as well unless it is given here, for it belongs to training. `given` tells for the
    /// key of a setting whether somebody chose it.
    ///
    /// # Errors
    /// A given setting contradicts the adapter.
    pub fn with_adapter(self, params: &[ParamSpec], file: &AdapterFile, given: &dyn Fn(&str) -> bool) -> Result<Self> {
        let theirs = &file.config;
        let agree = |key: &str, same: bool, own: &dyn Display, its: &dyn Display| {
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
        agree("rank", self.rank == theirs.rank, &self.rank, &theirs.rank)?;
        agree("alpha", self.alpha() == theirs.alpha, &self.alpha(), &theirs.alpha)?;
        agree("rslora", self.rslora == theirs.rslora, &self.rslora, &theirs.rslora)?;
        let same = given("targets") && self.names_layers_of(params, file)?;
        agree("targets", same, &self.targets.join(","), &theirs.targets.join(","))?;
        Ok(Self {
            rank: theirs.rank,
            alpha: Some(theirs.alpha),
            targets: theirs.targets.clone(),
            rslora: theirs.rslora,
            dropout: if given("dropout") { self.dropout } else { theirs.dropout as f32 },
            ..self
        })
    }

    /// As [`TrainConfig::with_adapter`], for settings of which nobody knows who chose them: those that are not the defaults
    /// were given.
    pub(super) fn of_adapter(self, params: &[ParamSpec], file: &AdapterFile) -> Result<Self> {
        let values = |config: &Self| serde_json::to_value(config).unwrap_or_default();
        let (own, default) = (values(&self), values(&Self::default()));
        self.with_adapter(params, file, &|key| own.get(key).unwrap_or(&Value::Null) != &default[key])
    }

    /// Whether the targets are the layers that the adapter has, however they are named.
    fn names_layers_of(&self, params: &[ParamSpec], file: &AdapterFile) -> Result<bool> {
        let names = |list: &[String]| list.iter().cloned().collect::<BTreeSet<_>>();
        if names(&self.targets) == names(&file.config.targets) {
            return Ok(true);
        }
        let named: BTreeSet<&str> = target_modules(params, &self.targets)?.into_iter().map(ParamSpec::module).collect();
        Ok(named == file.modules.iter().map(|m| m.path.as_str()).collect())
    }
}
