//! Keeping to a memory budget: what is given up for it, cheapest first.
//!
//! Each setting that might do is checked by a plan of its own ([`super::plan`]). All of them but moments in 8 bits leave
//! gradients as they are, up to the order of sums in f32 and to which kept inputs are rounded to 16 bits.

use super::plan::{MemoryPlan, Work};
use super::step::Layout;
use super::{Optimizer, TrainConfig, TrainPrecision};
use crate::error::{Error, ErrorCode, Result};

/// Share by which a process may end up above its plan: what allocators and thread stacks add.
const SPARE: f64 = 0.03;

/// Bytes that a process must be given to keep to `plan`.
fn needed(plan: &MemoryPlan) -> u64 {
    plan.before + (plan.anonymous() as f64 * (1.0 + SPARE)) as u64
}

/// The plan of a run, and the settings that it is for: those of `config`, with moments in 8 bits where nothing else was
/// enough. Without a budget nothing is given up that would cost time.
///
/// # Errors
/// The budget is too small whatever is given up; the smallest that would do is named.
pub(super) fn choose(work: &Work, config: &TrainConfig) -> Result<(MemoryPlan, TrainConfig)> {
    let first = Layout::fast(config.precision == TrainPrecision::Bf16);
    let Some(megabytes) = config.memory_budget else {
        return Ok((work.plan(config, work.largest, first)?, config.clone()));
    };
    let budget = megabytes.saturating_mul(1_000_000);
    let mut smallest = u64::MAX;
    for (config, tokens, layout) in ladder(work, config, first) {
        let plan = work.plan(&config, tokens, layout)?;
        let needed = needed(&plan);
        if needed <= budget {
            return Ok((plan, config));
        }
        smallest = smallest.min(needed);
    }
    let message = format!(
        "expected at least `{}` (MB) for this model, data and adapter, got `{megabytes}`; give it that much, or take a \
         lower `rank`, fewer `targets` or a shorter `seq`",
        smallest.div_ceil(1_000_000)
    );
    Err(Error::new(ErrorCode::Config, "setting `memory-budget`", message))
}

/// What to try, each given up in addition to those before: first what costs little time, then what costs much. Moments in
/// 8 bits cost none, but change what is learned a little, so they come after all that does not; but before inputs are
/// recomputed from the first for each layer anew, which takes many times as long.
fn ladder(work: &Work, config: &TrainConfig, first: Layout) -> Vec<(TrainConfig, usize, Layout)> {
    let layers = work.model.config().layers;
    let longest = work.lengths.first().copied().unwrap_or(0);
    let mut now = (config.clone(), work.largest, first);
    let mut rungs = vec![now.clone()];
    let mut lower = |change: &dyn Fn(&mut (TrainConfig, usize, Layout))| {
        change(&mut now);
        if rungs.last() != Some(&now) {
            rungs.push(now.clone());
        }
    };
    lower(&|now| now.2.loss_rows = 128);
    for share in [2, 4, 8, usize::MAX] {
        lower(&|now| now.1 = (work.largest / share).max(longest));
    }
    for part in [512, 256, 128, 64, 32] {
        lower(&|now| now.2.part = part);
    }
    lower(&|now| now.2.loss_rows = 32);
    for every in [2, 3, 4, 6, 8].into_iter().filter(|every| every * every <= 2 * layers) {
        lower(&|now| now.2.every = every);
    }
    if config.optimizer == Optimizer::AdamW {
        lower(&|now| now.0.optimizer = Optimizer::AdamW8bit);
    }
    for every in [layers.div_ceil(4), layers.div_ceil(2), layers] {
        lower(&|now| (now.2.every, now.2.between) = (every.max(1), false));
    }
    rungs
}
