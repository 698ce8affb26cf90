//! What PEFT's merge utilities do with values at the same place of several adapters: prune, elect a sign, add.
//! TIES: Yadav et al. 2023; DARE: Yu et al. 2023.

use super::MajoritySign;

/// Which values of a tensor stay.
pub(super) enum Prune<'a> {
    /// All of them.
    None,
    /// The `density` share with the largest absolute values.
    Magnitude,
    /// Each with a probability of `density`, divided by it: of tensor number `i`, those for which this holds.
    Random(&'a mut dyn FnMut(usize, usize) -> Vec<bool>),
}

/// The sum of `tensors`, each times its weight, after pruning and, with `elect`, without what has another sign than the
/// elected one: then divided by how many are left at a place.
pub(super) fn combined(
    mut tensors: Vec<Vec<f32>>,
    weights: &[f64],
    density: f64,
    prune: &mut Prune<'_>,
    elect: Option<MajoritySign>,
) -> Vec<f32> {
    for (i, tensor) in tensors.iter_mut().enumerate().filter(|_| density < 1.0) {
        match prune {
            Prune::None => {}
            Prune::Magnitude => keep_largest(tensor, density),
            Prune::Random(stays) => {
                let stays = stays(i, tensor.len());
                let one = |v: f32, stays: bool| if stays { (f64::from(v) / density) as f32 } else { 0.0 };
                tensor.iter_mut().zip(stays).for_each(|(v, stays)| *v = one(*v, stays));
            }
        }
    }
    let count = tensors.first().map_or(0, Vec::len);
    let at = |place: usize| {
        let values = || tensors.iter().map(|tensor| f64::from(tensor[place]));
        let sum = |agree: &dyn Fn(f64) -> bool| -> f64 {
            values().zip(weights).filter(|(v, _)| agree(*v)).map(|(v, weight)| v * weight).sum()
        };
        let Some(majority) = elect else { return sum(&|_| true) as f32 };
        let sign = |v: f64| if v == 0.0 { 0.0 } else { v.signum() };
        let vote: f64 = match majority {
            // In f32 as PEFT adds it: where values cancel, the sign is that of its rounding.
            MajoritySign::Total => f64::from(tensors.iter().fold(0.0f32, |sum, tensor| sum + tensor[place])),
            MajoritySign::Frequency => values().map(sign).sum(),
        };
        let elected = if vote >= 0.0 { 1.0 } else { -1.0 };
        let agree = |v: f64| sign(v) == elected;
        let left = values().filter(|v| agree(*v)).count().max(1);
        (sum(&agree) / left as f64) as f32
    };
    (0..count).map(at).collect()
}

/// Makes zeros of all but the `density` share of the largest absolute values; of equal ones the first stay.
fn keep_largest(values: &mut [f32], density: f64) {
    let keep = (density * values.len() as f64) as usize;
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    let size = |i: u32| values[i as usize].abs();
    if keep < order.len() {
        order.select_nth_unstable_by(keep, |&i, &j| size(j).total_cmp(&size(i)).then(i.cmp(&j)));
    }
    order[keep.min(values.len())..].iter().for_each(|&i| values[i as usize] = 0.0);
}
