//! Layers that rest while others learn, and layers that backward leaves out.
//!
//! A few layers at a time (`layers-at-once`): the tensors of all others have no gradient and stay as they are, and backward
//! ends at the lowest that learns. Which ones they are is a function of the seed and the step: by chance anew every
//! `layers-every` steps as in LISA (Pan et al. 2024), or in turn from the last layer down, as block-wise training has it
//! (BAdam, Luo et al. 2024). What belongs to no layer, such as the head, always learns. Moments of a tensor that rests stay,
//! and its steps are counted by themselves, as `torch` does it for tensors without a gradient.
//!
//! DropBP (Woo et al. 2024): backward leaves layers out by chance, `dx = dy` instead of `dx = dy + dy f'(x)`, so that neither
//! the layer is run again nor its tensors have a gradient. The share of layers left out is `dropbp` on average, and the
//! less a layer matters the more often it is. The paper measures how the gradients of all tensors change where one layer is
//! left out, with one backward pass for each. Here the first step, which leaves nothing out, measures each layer by what it
//! adds to the gradient that it passes on, `|dx - dy| / |dy|`: the whole change of what all layers below it get.

use super::Trainer;
use super::config::TrainConfig;
use super::trained::Trained;
use crate::adapter::Gradients;
use crate::base::Pool;
use crate::error::{Error, Result};
use crate::rng::{Rng, mix};
use pocketlora_kernels::{Backend, Call, doubles};
use serde::{Deserialize, Serialize};

/// Streams of random numbers that a run draws from its seed.
const CHOSEN: u64 = 0x6c69_7361;
const DROPPED: u64 = 0x6472_6f70;
/// Share of steps in which a layer is left out at most, so that each learns.
const MOST: f64 = 0.9;
/// Steps with the same layers, unless given.
pub(super) const EVERY: u64 = 10;

/// Which layers learn next, of those that learn a few at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerOrder {
    /// Drawn anew.
    #[default]
    Random,
    /// In turn, from the last down.
    Rotate,
}

impl TrainConfig {
    /// Whether each of `layers` layers learns in step `number` (1-based); none where all do.
    pub(super) fn layers_in_training(&self, number: u64, layers: usize) -> Option<Vec<bool>> {
        let count = self.layers_at_once?.min(layers);
        let period = (number - 1) / self.layers_every.unwrap_or(EVERY);
        let mut learns = vec![false; layers];
        match self.layers_order {
            LayerOrder::Random => {
                let order = Rng::new(mix(mix(self.seed, CHOSEN), period)).permutation(layers);
                order.into_iter().take(count).for_each(|layer| learns[layer] = true);
            }
            LayerOrder::Rotate => {
                let first = (period % layers as u64) as usize * count;
                (first..first + count).for_each(|i| learns[layers - 1 - i % layers] = true);
            }
        }
        Some(learns)
    }

    /// Which layers backward leaves out in micro-batch number `micro` of step `number`, by their `rates`.
    fn left_out(&self, rates: &[f64], number: u64, micro: usize) -> Vec<bool> {
        let mut rng = Rng::new(mix(mix(mix(self.seed, DROPPED), number), micro as u64));
        rates.iter().map(|rate| f64::from(rng.unit()) < *rate).collect()
    }

    /// Refuses more layers at a time than the `layers` that a model has.
    ///
    /// # Errors
    /// There are more.
    pub(super) fn check_layers_of(&self, layers: usize) -> Result<()> {
        let Some(count) = self.layers_at_once.filter(|count| *count > layers) else { return Ok(()) };
        let expected = format!("at most {layers}, the layers of this model; without it all of them learn at a time");
        Err(Error::config("layers-at-once", expected, count))
    }

    /// Checks these settings of theirs.
    ///
    /// # Errors
    /// The first that is out of range or has no effect.
    pub(super) fn check_layers(&self) -> Result<()> {
        let Self { layers_at_once, layers_every, layers_order, .. } = self;
        if *layers_at_once == Some(0) {
            return Err(Error::config("layers-at-once", "a whole number from 1", 0));
        }
        if *layers_every == Some(0) {
            return Err(Error::config("layers-every", "a whole number of steps from 1", 0));
        }
        for (name, on) in
            [("layers-every", layers_every.is_some()), ("layers-order", *layers_order != LayerOrder::default())]
        {
            if on && layers_at_once.is_none() {
                return Err(Error::config(name, "`layers-at-once` beside it", "none"));
            }
        }
        match self.dropbp {
            Some(share) if !(share > 0.0 && f64::from(share) <= MOST) => {
                Err(Error::config("dropbp", format!("a share above 0, up to {MOST}"), share))
            }
            _ => Ok(()),
        }
    }
}

/// How often layers of such sensitivities are left out: inversely to these, by `mean` on average, and never above
/// [`MOST`].
pub(super) fn drop_rates(sensitivities: &[f64], mean: f64) -> Vec<f64> {
    let least = sensitivities.iter().copied().filter(|s| *s > 0.0).fold(f64::INFINITY, f64::min);
    let inverse: Vec<f64> =
        sensitivities.iter().map(|s| if s.is_finite() { least / s.max(least) } else { 0.0 }).collect();
    let rates = |factor: f64| inverse.iter().map(move |i| (factor * i).min(MOST));
    let (mut low, mut high) = (0.0, 1e9);
    for _ in 0..200 {
        let middle = (low + high) / 2.0;
        let average = rates(middle).sum::<f64>() / inverse.len() as f64;
        if average < mean { low = middle } else { high = middle }
    }
    rates(low).collect()
}

/// Which layers a pass goes backward through.
pub struct Depth<B: Backend> {
    /// Backward ends with this layer.
    pub(super) lowest: usize,
    /// By layer, whether its gradient is passed on as it is; none where none is.
    pub(super) left_out: Vec<bool>,
    /// Of each layer the squares of what it adds to the gradient, and of the gradient that it gets: two sums in f64.
    pub(super) measured: Option<B::Buffer>,
}

impl<B: Backend> Default for Depth<B> {
    fn default() -> Self {
        Self { lowest: 0, left_out: Vec::new(), measured: None }
    }
}

impl<B: Backend> Depth<B> {
    /// Through all of `layers`, and they are measured.
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn measuring(backend: &B, layers: usize) -> Result<Self> {
        Ok(Self { measured: Some(backend.buffer(2 * 2 * layers)?), ..Self::default() })
    }

    pub(super) fn leaves_out(&self, layer: usize) -> bool {
        self.left_out.get(layer).copied().unwrap_or(false)
    }

    /// A copy of a layer's output gradient, where layers are measured.
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn before(&self, backend: &B, dy: &B::Buffer, pool: &mut Pool<B>) -> Result<Option<B::Buffer>> {
        if self.measured.is_none() {
            return Ok(None);
        }
        let mut copy = pool.take(backend, backend.len(dy))?;
        backend.run(Call::Copy { x: dy, y: &mut copy })?;
        Ok(Some(copy))
    }

    /// Adds the squares of `dx - dy` and of `dy` to the sums of `layer`, with `dy` as [`Depth::before`] has kept it.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn measure(
        &mut self,
        backend: &B,
        layer: usize,
        dy: Option<B::Buffer>,
        dx: Option<&B::Buffer>,
        pool: &mut Pool<B>,
    ) -> Result<()> {
        let (Some(sums), Some(mut dy)) = (&mut self.measured, dy) else { return Ok(()) };
        if let Some(dx) = dx {
            backend.run(Call::SumSquares { x: &dy, at: 2 * layer + 1, y: sums })?;
            backend.run(Call::Scale { factor: -1.0, x: &mut dy })?;
            backend.run(Call::AddAssign { x: dx, y: &mut dy })?;
            backend.run(Call::SumSquares { x: &dy, at: 2 * layer, y: sums })?;
        }
        pool.put(backend, dy);
        Ok(())
    }
}

/// Layers of the step under way.
pub(super) struct StepLayers<B: Backend> {
    /// Those that learn; none where all do.
    learns: Option<Vec<bool>>,
    /// Those that something went backward through.
    passed: Vec<bool>,
    pub depth: Depth<B>,
}

impl<B: Backend> Default for StepLayers<B> {
    fn default() -> Self {
        Self { learns: None, passed: Vec::new(), depth: Depth::default() }
    }
}

impl<B: Backend> StepLayers<B> {
    /// Before micro-batch number `micro` of step `number`.
    pub fn draw(&mut self, config: &TrainConfig, rates: &[f64], number: u64, micro: usize) {
        self.depth.left_out = if rates.is_empty() { Vec::new() } else { config.left_out(rates, number, micro) };
        for (layer, passed) in self.passed.iter_mut().enumerate() {
            *passed |= !self.depth.leaves_out(layer);
        }
    }

    /// Whether `layer`'s tensors are moved in this step.
    fn moves(&self, layer: usize) -> bool {
        self.learns.as_ref().is_none_or(|learns| learns.get(layer) != Some(&false))
            && self.passed.get(layer) != Some(&false)
    }
}

impl<B: Backend> Trainer<B> {
    /// Chooses the layers of step `number`.
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn choose_layers(&mut self, number: u64) -> Result<()> {
        let layers = self.base.model.config().layers;
        let counted = self.config.layers_at_once.is_some() || self.config.dropbp.is_some();
        let learns = self.config.layers_in_training(number, layers);
        // What is added to embeddings is below all layers.
        let whole = self.adapters.learns_embedding(&self.base);
        let lowest = learns.as_ref().and_then(|learns| learns.iter().position(|learns| *learns));
        let measures = self.config.dropbp.is_some() && self.facts.drop_rates.is_empty();
        let depth = if measures { Depth::measuring(&self.base.backend, layers)? } else { Depth::default() };
        let depth = Depth { lowest: lowest.filter(|_| !whole).unwrap_or(0), ..depth };
        self.layers = StepLayers { learns, passed: if counted { vec![false; layers] } else { Vec::new() }, depth };
        let Gradients { resting, tensors } = &mut self.grads;
        *resting = vec![false; tensors.len()];
        for Trained { id, layer, .. } in &self.tensors {
            let rests =
                layer.zip(self.layers.learns.as_ref()).is_some_and(|(layer, learns)| learns.get(layer) == Some(&false));
            resting[id.number()] = rests;
        }
        Ok(())
    }

    /// Takes note of the step's layers once its gradient is there: counts the steps of those that move, and the first time
    /// finds out how often each is left out.
    ///
    /// # Errors
    /// Device lost.
    pub(super) fn note_layers(&mut self) -> Result<()> {
        let layers = &self.layers;
        if !layers.passed.is_empty() {
            self.facts.layer_steps.resize(layers.passed.len(), 0);
            let steps = self.facts.layer_steps.iter_mut().enumerate();
            steps.filter(|(layer, _)| layers.moves(*layer)).for_each(|(_, steps)| *steps += 1);
        }
        if let (Some(measured), Some(mean)) = (&self.layers.depth.measured, self.config.dropbp) {
            let backend = &self.base.backend;
            let mut values = vec![0.0; backend.len(measured)];
            backend.read(measured, &mut values)?;
            let sums = doubles(&values);
            let of = |pair: &[f64]| if pair[1] > 0.0 { (pair[0] / pair[1]).sqrt() } else { f64::INFINITY };
            let sensitivities: Vec<f64> = sums.chunks_exact(2).map(of).collect();
            self.facts.drop_rates = drop_rates(&sensitivities, f64::from(mean));
        }
        Ok(())
    }

    /// How many steps the tensor `t` has been moved, with step `number` that is under way; none where it rests.
    pub(super) fn steps_of(&self, t: &Trained<B>, number: u64) -> Option<u64> {
        let own = t.layer.filter(|_| !self.facts.layer_steps.is_empty());
        let steps = match own {
            Some(layer) if !self.layers.moves(layer) => return None,
            Some(layer) => self.facts.layer_steps.get(layer).copied().unwrap_or(number),
            None => number,
        };
        Some(self.config.steps_since_restart(number).map_or(steps, |since| steps.min(since)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::layer_of;

    #[test]
    fn layers_take_turns_as_asked() {
        let of = |order| TrainConfig {
            layers_at_once: Some(2),
            layers_every: Some(3),
            layers_order: order,
            ..TrainConfig::default()
        };
        let rotate = of(LayerOrder::Rotate);
        let chosen = |config: &TrainConfig, number| -> Vec<usize> {
            let learns = config.layers_in_training(number, 5).unwrap();
            (0..5).filter(|layer| learns[*layer]).collect()
        };
        let expected = [[3, 4], [3, 4], [3, 4], [1, 2], [1, 2], [1, 2], [0, 4], [0, 4], [0, 4], [2, 3]];
        assert_eq!((1..=10).map(|number| chosen(&rotate, number)).collect::<Vec<_>>(), expected);
        let random = of(LayerOrder::Random);
        let drawn: Vec<Vec<usize>> = (0..400).map(|period| chosen(&random, 3 * period + 1)).collect();
        assert!(drawn.iter().all(|layers| layers.len() == 2));
        assert_eq!(chosen(&random, 4), chosen(&random, 6));
        for layer in 0..5 {
            let count = drawn.iter().filter(|layers| layers.contains(&layer)).count();
            assert!((110..210).contains(&count), "layer {layer} learned in {count} of 400 periods");
        }
        assert_eq!(TrainConfig::default().layers_in_training(1, 5), None);
        assert_eq!(layer_of("model.layers.7.mlp.experts.3.up_proj.lora_A.weight"), Some(7));
        assert_eq!(layer_of("lm_head.lora_A.weight"), None);
    }

    #[test]
    fn what_matters_less_is_left_out_more_often() {
        for (sensitivities, mean) in [
            (&[1.0, 2.0, 4.0][..], 0.3),
            (&[1.0, 1.0, 1.0], 0.5),
            (&[1.0, 100.0, 100.0, 100.0], 0.5),
            (&[f64::INFINITY, 1.0, 2.0], 0.5),
            (&[0.0, 1.0], 0.9),
        ] {
            let rates = drop_rates(sensitivities, mean);
            let finite = sensitivities.iter().filter(|s| s.is_finite()).count() as f64;
            let reachable = mean.min(MOST * finite / rates.len() as f64);
            let average = rates.iter().sum::<f64>() / rates.len() as f64;
            assert!((average - reachable).abs() < 1e-6, "{sensitivities:?}: {rates:?}");
            for (i, j) in (0..rates.len()).flat_map(|i| (0..rates.len()).map(move |j| (i, j))) {
                assert!(
                    sensitivities[i] > sensitivities[j] || rates[i] >= rates[j] - 1e-9,
                    "{sensitivities:?}: {rates:?}"
                );
            }
        }
    }

    #[test]
    fn bad_settings_name_themselves() {
        let usual = TrainConfig::default;
        for (config, name) in [
            (TrainConfig { layers_at_once: Some(0), ..usual() }, "layers-at-once"),
            (TrainConfig { layers_every: Some(3), ..usual() }, "layers-every"),
            (TrainConfig { layers_order: LayerOrder::Rotate, ..usual() }, "layers-order"),
            (TrainConfig { layers_at_once: Some(1), layers_every: Some(0), ..usual() }, "layers-every"),
            (TrainConfig { dropbp: Some(0.0), ..usual() }, "dropbp"),
            (TrainConfig { dropbp: Some(0.95), ..usual() }, "dropbp"),
            (TrainConfig { dropbp: Some(f32::NAN), ..usual() }, "dropbp"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }
}
