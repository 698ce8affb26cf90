//! What tells that a run gets no better: records that are left out of it, and answers under other wordings of their
//! questions.

use super::reword::reworded;
use super::survey::Survey;
use crate::data::record::Record;
use crate::error::Result;
use crate::train::{Dataset, Sample};

/// Samples that are watched at most, beside those that are left out.
const MOST: usize = 24;

/// Divides `data`, of which `survey` tells, into what is learned and what is watched; `encode` makes samples of records.
///
/// # Errors
/// Those of `encode`.
pub(crate) fn watched(
    data: Dataset,
    survey: &Survey,
    encode: &dyn Fn(Vec<Record>) -> Result<Vec<Sample>>,
) -> Result<(Dataset, Option<Dataset>)> {
    let left = survey.left_out();
    // A look costs a third of a step on as much, and there are some ten of them.
    let most = MOST.min(data.records.div_ceil(3));
    let room = if left.is_empty() || survey.has_wordings() { most.saturating_sub(left.len()) } else { 0 };
    let (data, mut watched) = data.partition(|record| left.contains(&record));
    let others = survey.kept.iter().filter(|(number, _)| !left.contains(number)).take(room).enumerate();
    let samples = encode(others.filter_map(|(i, (_, record))| reworded(record, i)).collect())?;
    watched.records += samples.len();
    watched.samples.extend(samples);
    let any = !watched.samples.is_empty();
    Ok((data, any.then_some(watched)))
}
