//! Training on an engine.

use super::Engine;
use crate::adapter::{AdapterFile, Centroid};
use crate::error::Result;
use crate::memory::Peak;
use crate::mmap::ReleasesFreed;
use crate::text::carry;
use crate::train::auto::{Probe, Rates};
use crate::train::{
    self, DataReport, Dataset, KeepReport, Material, MemoryPlan, Observer, Policy, StepReport, Summary, TrainConfig,
    TrainHandle,
};
use pocketlora_kernels::Cpu;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A run between two steps. Chats on the same engine answer while it works: it gives way between layers, and to all of
/// them while it is paused.
pub struct Trainer {
    inner: train::Trainer<Cpu>,
    engine: Engine,
    /// The centroid of what the adapter was taught that the run starts from.
    taught: Option<Centroid>,
    out: PathBuf,
    _release: ReleasesFreed,
}

impl Engine {
    /// Prepares a run whose adapter will be written to the folder `out`, from scratch or from the adapter `init`. Attached
    /// adapters take no part in it. See [`Reader::material`](crate::Reader::material) for what becomes of the data.
    ///
    /// With an adapter or checkpoint of an earlier run in `out`, call [`Trainer::resume`] to go on from that checkpoint, or
    /// [`Trainer::replace_earlier`] to let this run replace them. Without either, no step is done.
    ///
    /// # Errors
    /// A setting is out of range, `out` holds a model, another trainer works in `out`, `init` belongs to another base, there is nothing to
    /// learn, out of memory.
    pub fn trainer(
        &self,
        config: TrainConfig,
        data: Dataset,
        eval_data: Option<Dataset>,
        init: Option<&AdapterFile>,
        out: &Path,
    ) -> Result<Trainer> {
        let text = self.text();
        let shipped = text.as_ref().map(|text| self.shipped(text));
        let shipped = shipped.as_ref().map_err(|_| self.0.dir.as_path());
        let material = Material::new(&config, data, eval_data, shipped)?;
        self.trainer_of(config, material, init, out)
    }

    /// As [`Engine::trainer`], when the material is there already.
    ///
    /// # Errors
    /// As there.
    pub fn trainer_of(
        &self,
        config: TrainConfig,
        mut material: Material,
        init: Option<&AdapterFile>,
        out: &Path,
    ) -> Result<Trainer> {
        // A choice may have left out what the material was made for.
        material.heed(&config);
        init.map_or(Ok(()), |file| self.check_strictly(file))?;
        let text = config.prompt_init_text.as_ref().filter(|_| init.is_none() && material.prompt_ids.is_none());
        if let Some(text) = text {
            material.prompt_ids = Some(self.text()?.tokenizer.encode(text, false)?);
        }
        self.choose_threads_for_long();
        let taught = init.map_or(Ok(None), AdapterFile::centroid)?;
        let name = Some(self.0.base_name.clone());
        let base = Arc::clone(self.base());
        let turn = self.turn().take();
        let mut inner = train::Trainer::new(base, self.0.fingerprint, name, config, material, init, out)?;
        drop(turn);
        inner.take_turns(self.turn().clone());
        let own = init.map(|file| self.own(file)).transpose()?.flatten();
        carry(own.as_ref(), &self.0.dir, out)?;
        let text_bytes = self.0.text_bytes.load(Ordering::Relaxed);
        inner.beside_tokenizer(self.0.text.as_ref().map_or(0, |_| text_bytes), text_bytes);
        Ok(Trainer { inner, engine: self.clone(), taught, out: out.to_owned(), _release: ReleasesFreed })
    }

    /// The centroid of what `data` asks; none where nothing is asked.
    ///
    /// # Errors
    /// Out of memory.
    pub fn centroid(&self, data: &Dataset) -> Result<Option<Centroid>> {
        Centroid::of(self.base(), data.samples.len(), |i| data.samples[i].question())
    }
}

impl Trainer {
    /// The run itself.
    #[cfg(feature = "bench")]
    pub(crate) fn inner(&mut self) -> &mut train::Trainer<Cpu> {
        &mut self.inner
    }

    /// Tries learning rates, see [`train::Trainer::probe`].
    pub(super) fn probe(
        &mut self,
        rates: &Rates,
        watched: Option<&Dataset>,
        observer: &mut dyn Observer,
    ) -> Result<Probe> {
        self.inner.probe(rates, watched, observer)
    }

    /// Steps done.
    #[must_use]
    pub fn step_number(&self) -> u64 {
        self.inner.step_number()
    }

    /// Steps in all.
    #[must_use]
    pub fn total_steps(&self) -> u64 {
        self.inner.total_steps()
    }

    /// What the run will hold in memory.
    #[must_use]
    pub fn plan(&self) -> MemoryPlan {
        self.inner.plan(self.engine.mapped_bytes())
    }

    /// Figures of what is learned.
    #[must_use]
    pub fn data_report(&mut self) -> DataReport {
        self.inner.data_report()
    }

    /// How the run is held to what the base says on general prompts, if it is.
    #[must_use]
    pub fn keep_report(&self) -> Option<KeepReport> {
        self.inner.keep_report()
    }

    /// General questions that are asked before the run and after it; 0 for none.
    #[must_use]
    pub fn questions(&self) -> usize {
        self.inner.questions()
    }

    /// Trained values.
    #[must_use]
    pub fn trained_parameters(&self) -> usize {
        self.inner.trained_parameters()
    }

    /// Memory at the fullest moments of the steps so far.
    #[must_use]
    pub fn peak(&self) -> Peak {
        self.inner.peak()
    }

    /// Gradients that the optimizer had in the last step, clipped and all, under their PEFT names.
    ///
    /// # Errors
    /// Device lost.
    pub fn gradients(&self) -> Result<Vec<(String, Vec<f32>)>> {
        self.inner.gradients()
    }

    /// A handle that pauses, resumes and stops this trainer, and asks for snapshots, from any thread.
    #[must_use]
    pub fn handle(&self) -> TrainHandle {
        self.inner.handle()
    }

    /// Has the run end with the first step that is done at `time`, and write the adapter as it is then.
    pub fn end_by(&mut self, time: Instant) {
        self.inner.end_by(time);
    }

    /// Sets the rule that is asked between layers whether to work, pause or stop.
    pub fn set_policy(&mut self, policy: Policy) {
        self.inner.set_policy(policy);
    }

    /// Lets this run replace the adapter or the checkpoint that an earlier one left in its folder.
    pub fn replace_earlier(&mut self) {
        self.inner.replace_earlier();
    }

    /// Runs to the end, or until the observer, the policy or a handle stops it; then writes the adapter, or a checkpoint.
    ///
    /// # Errors
    /// An earlier run's work would be replaced, non-finite loss or gradients (the last checkpoint is kept), files that
    /// cannot be written, out of memory.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Summary> {
        let summary = self.inner.run(observer)?;
        if summary.done {
            self.leave_centroid()?;
        }
        Ok(summary)
    }

    /// Writes beside the adapter what it was taught about, now and before.
    fn leave_centroid(&self) -> Result<()> {
        let turn = self.engine.turn().take();
        let own = self.engine.centroid(self.inner.data())?;
        drop(turn);
        let all = match (own, &self.taught) {
            (Some(own), Some(before)) => Some(own.joined(before)),
            (own, before) => own.or_else(|| before.clone()),
        };
        all.map_or(Ok(()), |centroid| centroid.write(&self.out))
    }

    /// One optimizer step. A stopped or failed one leaves the run as it was before.
    ///
    /// # Errors
    /// An earlier run's work would be replaced, all steps are done, stopped by the observer, non-finite loss or gradients, out of memory.
    pub fn step(&mut self, observer: &mut dyn Observer) -> Result<StepReport> {
        self.inner.step(observer)
    }

    /// Goes on from the checkpoint in the output folder.
    ///
    /// # Errors
    /// There is none, or it is of another run.
    pub fn resume(&mut self) -> Result<()> {
        self.inner.resume()
    }

    /// Writes a checkpoint.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save_checkpoint(&mut self) -> Result<()> {
        self.inner.save_checkpoint()
    }

    /// The adapter after the last whole step, as it would be written.
    ///
    /// # Errors
    /// A value does not fit f16.
    pub fn snapshot(&self) -> Result<AdapterFile> {
        self.inner.snapshot()
    }

    /// Writes the adapter into the output folder.
    ///
    /// # Errors
    /// The files cannot be written; a value does not fit f16.
    pub fn save_adapter(&mut self) -> Result<()> {
        self.inner.save_adapter()?;
        self.leave_centroid()
    }
}
