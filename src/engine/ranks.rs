//! Ranks that follow what layers matter for some data, see [`crate::train::RankChoice`].

use super::Engine;
use crate::adapter::Kind;
use crate::error::{Error, ErrorCode, Result};
use crate::train::auto::few;
use crate::train::{Dataset, Material, Observer, Optimizer, RankChoice, Schedule, TrainConfig};

/// Random directions on which each layer's gradient is measured: its norm is right to about `1 / sqrt(2 r)`, an eighth.
const DIRECTIONS: usize = 32;
/// Passes whose mean gradient is looked at.
const PASSES: usize = 8;
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

impl Engine {
    /// Measures how much each layer matters for `data` that `config` names as a target, and shares its budget of ranks out
    /// ([`TrainConfig::rank_budget`]); [`RankChoice::apply`] puts them into the settings of a run. `observer` hears of it as of
    /// one step. To be called without attached adapters.
    ///
    /// # Errors
    /// There is no budget or too small a one, a setting is out of range, stopped by the observer, out of memory.
    pub fn choose_ranks(
        &self,
        config: &TrainConfig,
        data: &Dataset,
        observer: &mut dyn Observer,
    ) -> Result<RankChoice> {
        config.validate()?;
        let budget = config.rank_budget().ok_or_else(|| {
            Error::new(ErrorCode::Config, "choice of ranks", "expected `budget-parameters` or `budget-mb`, got neither")
        })?;
        let batch = config.batch.min(data.samples.len()).max(1);
        let data = few(data, PASSES * batch, usize::MAX, config.seed);
        let measuring = TrainConfig {
            method: Kind::Lora,
            rank: DIRECTIONS,
            targets: config.targets.clone(),
            seq: config.seq,
            precision: config.precision,
            memory_budget: config.memory_budget,
            seed: config.seed,
            batch,
            accumulate: data.samples.len().div_ceil(batch).max(1),
            steps: Some(1),
            // So small that no value changes: only gradients are wanted.
            lr: 1e-30,
            optimizer: Optimizer::Sgd,
            clip: 0.0,
            schedule: Schedule::Constant,
            warmup: 0.0,
            ..TrainConfig::default()
        };
        let factor = measuring.alpha() / measuring.rank as f64;
        let scratch = tempfile::tempdir().map_err(|e| Error::io("create a folder in", &std::env::temp_dir(), e))?;
        let mut trainer = self.trainer_of(measuring, Material::of(data), None, scratch.path())?;
        let report = trainer.step(observer)?;
        let _ = observer.on_step(&report);
        let gradients = trainer.gradients()?;
        let mut measured = Vec::with_capacity(gradients.len() / 2);
        // A and B of a layer follow each other.
        for pair in gradients.windows(2) {
            let [(a, of_a), (b, of_b)] = pair else { continue };
            let (Some(module), Some(_)) = (a.strip_suffix(A), b.strip_suffix(B)) else { continue };
            let (input, out) = (of_a.len() / DIRECTIONS, of_b.len() / DIRECTIONS);
            let squares: f64 = of_b.iter().map(|g| f64::from(*g).powi(2)).sum();
            let score = (squares * 3.0 * input as f64 / DIRECTIONS as f64).sqrt() / factor;
            measured.push((module.to_owned(), [out, input], score));
        }
        if 2 * measured.len() != gradients.len() {
            let expected =
                "linear layers and the head for ranks by measurement: give those of an embedding by `rank-pattern`";
            return Err(Error::config("targets", expected, "an embedding"));
        }
        config.share_ranks(measured, budget)
    }
}
