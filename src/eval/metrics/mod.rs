//! How well a model answers: tasks, and the measures of texts.

mod bleu;
mod labels;
mod logits_file;
mod porter;
mod record;
mod rouge;
mod tasks;
#[cfg(test)]
mod tests;

pub use bleu::bleu;
pub use labels::{accuracy, exact_match, holding, macro_f1, normalized};
pub use logits_file::save_logits;
pub use record::{Ask, Expected, Record, Records, read_records};
pub use rouge::{Rouge, rouge};
pub use tasks::{LabelBy, Metric, TaskOptions, TaskReport, metrics_for, run_tasks};

use super::{Likelihood, Score, logits_of, nll, stopped};
