//! Settings without an effect: refused by name, so that nobody waits for what they were to do.

use super::TrainConfig;
use super::config::Optimizer;
use crate::adapter::{DropoutForm, Kind};
use crate::error::{Error, ErrorCode, Result};

/// Settings that some methods of adapters read, and others do not.
const ADAPTER: [&str; 16] = [
    "rank",
    "alpha",
    "rslora",
    "targets",
    "feedforward-modules",
    "num-virtual-tokens",
    "num-frozen-tokens",
    "encoder-hidden-size",
    "prompt-init-text",
    "trainable-token-indices",
    "alora-invocation-tokens",
    "init-lora-weights",
    "bias",
    "dropout",
    "lora-plus-ratio",
    "options",
];

/// A setting of how AdaLoRA learns.
const GROW: &str = "grow-ranks";

/// Settings of how a plain LoRA learns.
const OF_LORA: [&str; 3] = ["dropout-form", "relora", "riemannian"];

/// Settings that only a fresh LoRA begins with.
pub(super) const OF_FRESH: [&str; 4] = ["rank-pattern", "alpha-pattern", "budget-parameters", "budget-mb"];

impl TrainConfig {
    /// Whether `key` is one that the adapter's method does not read.
    pub(super) fn is_idle(&self, key: &str) -> bool {
        if key == GROW {
            return self.method != Kind::Adalora;
        }
        let of_lora = OF_FRESH.contains(&key) || OF_LORA.contains(&key);
        ADAPTER.contains(&key) && !self.kinds().any(|kind| kind.reads(key)) || of_lora && self.method != Kind::Lora
    }

    /// Whether the setting `name`, one of those in [`TrainConfig::check_effect`], differs from its default.
    pub(super) fn is_changed(&self, name: &str) -> bool {
        let usual = Self::default();
        match name {
            "momentum" => self.momentum != usual.momentum,
            "beta1" => self.beta1 != usual.beta1,
            "beta2" => self.beta2 != usual.beta2,
            "eps" => self.eps != usual.eps,
            "epochs" => self.epochs != usual.epochs,
            // Unless it is given it follows from the rank.
            "alpha" => self.alpha != usual.alpha,
            "dropout-form" => self.dropout_form != usual.dropout_form,
            GROW => self.grow_ranks,
            "relora" => self.relora.is_some(),
            "riemannian" => self.riemannian.is_some(),
            key if OF_FRESH.contains(&key) => self.begins(key),
            key if ADAPTER.contains(&key) => self.adapter().shown(key) != usual.adapter().shown(key),
            _ => false,
        }
    }

    /// Refuses settings that were `given` and that others make idle.
    ///
    /// # Errors
    /// The first of them.
    pub(crate) fn check_effect(&self, given: &dyn Fn(&str) -> bool) -> Result<()> {
        use Optimizer::{AdamW, AdamW8bit, Lion, Sgd};
        let owners: [(&str, &[Optimizer]); 4] = [
            ("momentum", &[Sgd]),
            ("beta1", &[AdamW, AdamW8bit, Lion]),
            ("beta2", &[AdamW, AdamW8bit, Lion]),
            ("eps", &[AdamW, AdamW8bit]),
        ];
        for (name, optimizers) in owners {
            if given(name) && !optimizers.contains(&self.optimizer) {
                let known: Vec<&str> = optimizers.iter().map(|o| o.name()).collect();
                let message = format!(
                    "expected an optimizer that has it (`{}`), got `{}`; leave one of the two out",
                    known.join("`, `"),
                    self.optimizer.name()
                );
                return Err(Error::new(ErrorCode::Config, format!("setting `{name}`"), message));
            }
        }
        if let Some(name) = ADAPTER
            .iter()
            .chain(&OF_FRESH)
            .chain(&OF_LORA)
            .chain(&[GROW])
            .find(|name| given(name) && self.is_idle(name))
        {
            let keys: Vec<&str> = self.options.keys().map(String::as_str).collect();
            let what = if *name == "options" { format!("`{}`", keys.join("`, `")) } else { "it".to_owned() };
            let message = format!(
                "expected a method that has {what}, got `{}` as the `method`; leave one of the two out",
                self.method.name()
            );
            return Err(Error::new(ErrorCode::Config, format!("setting `{name}`"), message));
        }
        if given("dropout-form") && self.dropout_form != DropoutForm::Input && self.dropout == 0.0 {
            return Err(Error::config("dropout-form", "a `dropout` above 0 beside it", self.dropout));
        }
        if self.layers_at_once.is_some() && (self.method.parts().is_empty() || !self.method.shared().is_empty()) {
            let got = self.method.name();
            return Err(Error::config("layers-at-once", "a method whose tensors belong to single layers", got));
        }
        match self.steps {
            Some(steps) if given("epochs") => {
                let message = format!("expected either it or `steps`, got both, `{}` and `{steps}`", self.epochs);
                Err(Error::new(ErrorCode::Config, "setting `epochs`", message + "; leave one of them out"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses settings of evaluations that have nothing to evaluate; `held_out` says whether there is such data.
    ///
    /// # Errors
    /// The first of them.
    pub(crate) fn check_evaluated(&self, held_out: bool) -> Result<()> {
        let every = self.eval_every > 0 && self.max_forgetting.is_none();
        for (name, on) in [("patience", self.patience > 0), ("keep-best", self.keep_best), ("eval-every", every)] {
            if on && !held_out {
                let message = "expected data to evaluate on beside it, got none; give `eval-data` or `eval-split`";
                return Err(Error::new(ErrorCode::Config, format!("setting `{name}`"), message));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_without_an_effect_name_themselves() {
        let of = |optimizer| TrainConfig { optimizer, ..TrainConfig::default() };
        let usual = TrainConfig::default;
        for (config, idle) in [
            (TrainConfig { momentum: 0.9, ..usual() }, Some("momentum")),
            (TrainConfig { momentum: 0.9, ..of(Optimizer::AdamW8bit) }, Some("momentum")),
            (TrainConfig { momentum: 0.9, ..of(Optimizer::Lion) }, Some("momentum")),
            (TrainConfig { momentum: 0.9, ..of(Optimizer::Sgd) }, None),
            (TrainConfig { beta1: 0.5, ..of(Optimizer::Sgd) }, Some("beta1")),
            (TrainConfig { beta2: Some(0.5), ..of(Optimizer::Sgd) }, Some("beta2")),
            (TrainConfig { beta1: 0.5, beta2: Some(0.5), ..of(Optimizer::Lion) }, None),
            (TrainConfig { eps: 1.0, ..of(Optimizer::Sgd) }, Some("eps")),
            (TrainConfig { eps: 1e-3, ..of(Optimizer::Lion) }, Some("eps")),
            (TrainConfig { eps: 1e-3, ..of(Optimizer::AdamW8bit) }, None),
            (TrainConfig { steps: Some(2), epochs: 9, ..usual() }, Some("epochs")),
            (TrainConfig { steps: Some(2), ..usual() }, None),
        ] {
            match (config.validate(), idle) {
                (Err(e), Some(name)) => assert_eq!(e.place(), format!("setting `{name}`")),
                (Ok(()), None) => {}
                (other, _) => panic!("{idle:?}: {other:?} of {config:?}"),
            }
        }
        // A default that somebody typed was to have an effect, too.
        of(Optimizer::Sgd).check_effect(&|name| name == "beta1").unwrap_err();
    }

    #[test]
    fn evaluations_need_something_to_evaluate() {
        let config = TrainConfig { eval_every: 2, ..TrainConfig::default() };
        assert_eq!(config.check_evaluated(false).unwrap_err().place(), "setting `eval-every`");
        config.check_evaluated(true).unwrap();
        TrainConfig { max_forgetting: Some(0.1.into()), ..config }.check_evaluated(false).unwrap();
    }
}
