//! What the device was told to do and how far it is.
//!
//! Time is counted in epochs: between two of them lies a barrier. Every [`Span`] knows the epochs in which it is last
//! read and written, from which follows whether the next dispatch needs a barrier before it and whether the host has to
//! wait for the device. Dispatches of one epoch may run at the same time.

#![allow(unsafe_code, reason = "one wait for the device when this is dropped")]

use super::batch::Commands;
use super::device::Device;
use super::memory::Span;
use super::pipeline::{BINDINGS, Job, Pipelines};
use crate::{Access, Error};
use ash::prelude::VkResult;
use ash::vk;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Batches in flight before the host waits for the oldest: bounds the memory of dropped buffers that await their work.
const IN_FLIGHT: usize = 8;

/// Records, submits and waits. Guards the queue.
pub(super) struct Recorder {
    device: Arc<Device>,
    pipelines: Pipelines,
    timeline: Mutex<Timeline>,
}

#[derive(Default)]
struct Timeline {
    /// Number of the current epoch; 0 is before all work.
    epoch: u64,
    /// The last epoch that the device is done with.
    done: u64,
    open: Option<Commands>,
    /// Submitted batches with their last epochs, the oldest first.
    flying: VecDeque<(u64, Commands)>,
    idle: Vec<Commands>,
    /// Why the device can do no more. Operations cannot fail, so this waits for the next read.
    lost: Option<String>,
    recorded: u64,
    waits: u64,
}

impl Recorder {
    pub fn new(device: &Arc<Device>) -> Result<Self, Error> {
        let pipelines = Pipelines::new(device)?;
        Ok(Self { device: Arc::clone(device), pipelines, timeline: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Timeline> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations recorded so far.
    pub fn recorded(&self) -> u64 {
        self.lock().recorded
    }

    /// Times that the host waited for the device.
    pub fn waits(&self) -> u64 {
        self.lock().waits
    }

    /// Records a job, which writes the last buffer; panics if a buffer is too short for it.
    pub fn dispatch(&self, job: &Job, buffers: [&Arc<Span>; BINDINGS], groups: u32) {
        let [inputs @ .., output] = buffers;
        self.record(&inputs, output, |batch| batch.dispatch(&self.pipelines, job, buffers, groups));
    }

    /// Zeros all of `memory`.
    pub fn zero(&self, memory: &Arc<Span>) {
        self.record(&[], memory, |batch| {
            batch.zero(memory);
            Ok(())
        });
    }

    fn record(&self, inputs: &[&Arc<Span>], output: &Span, work: impl FnOnce(&mut Commands) -> VkResult<()>) {
        let timeline = &mut *self.lock();
        if timeline.lost.is_none()
            && let Err(error) = timeline.record(&self.device, inputs, output, work)
        {
            self.lose(timeline, error);
        }
    }

    /// Waits until the host may access all that `visit` shows in the way it says. Work that does not touch it goes on.
    pub fn settle(&self, visit: impl FnOnce(&mut dyn FnMut(&Span, Access))) {
        let timeline = &mut *self.lock();
        let mut until = 0;
        visit(&mut |memory, access| {
            let read = if access == Access::Write { memory.read.load(Relaxed) } else { 0 };
            until = until.max(memory.written.load(Relaxed)).max(read);
        });
        if timeline.lost.is_none()
            && let Err(error) = timeline.wait_for(until)
        {
            self.lose(timeline, error);
        }
    }

    /// The failure that the operations so far kept to themselves.
    pub fn check(&self) -> Result<(), Error> {
        self.lock().lost.clone().map_or(Ok(()), |why| Err(Error::Device(why)))
    }

    fn lose(&self, timeline: &mut Timeline, why: vk::Result) {
        timeline.lost = Some(format!("vulkan: {why}"));
        // Nobody waits from now on, so what still runs must end before the host uses its memory.
        self.wait_idle();
    }

    fn wait_idle(&self) {
        // SAFETY: the device is alive, and the caller holds the lock that guards the queue, or owns all. An error means
        // that the device is lost, after which it does no more work either.
        let _ = unsafe { self.device.raw.device_wait_idle() };
    }
}

impl Timeline {
    fn record(
        &mut self,
        device: &Arc<Device>,
        inputs: &[&Arc<Span>],
        output: &Span,
        work: impl FnOnce(&mut Commands) -> VkResult<()>,
    ) -> VkResult<()> {
        if self.open.is_none() {
            let mut batch = self.ready(device)?;
            batch.begin()?;
            // Earlier batches may still run.
            batch.barrier();
            self.epoch += 1;
            self.open = Some(batch);
        }
        let Some(batch) = &mut self.open else { return Ok(()) };
        let now = |stamp: &AtomicU64| stamp.load(Relaxed) == self.epoch;
        if inputs.iter().any(|input| now(&input.written)) || now(&output.read) || now(&output.written) {
            batch.barrier();
            self.epoch += 1;
        }
        work(batch)?;
        for input in inputs {
            input.read.store(self.epoch, Relaxed);
        }
        output.written.store(self.epoch, Relaxed);
        self.recorded += 1;
        if batch.is_full() { self.submit() } else { Ok(()) }
    }

    fn submit(&mut self) -> VkResult<()> {
        if let Some(mut batch) = self.open.take() {
            let submitted = batch.submit();
            // Also if that failed: what it holds must outlive what of it may have reached the device.
            self.flying.push_back((self.epoch, batch));
            submitted?;
        }
        Ok(())
    }

    /// A batch to record into.
    fn ready(&mut self, device: &Arc<Device>) -> VkResult<Commands> {
        while let Some((_, batch)) = self.flying.front() {
            if self.flying.len() >= IN_FLIGHT {
                self.waits += 1;
                batch.wait()?;
            } else if !batch.is_done()? {
                break;
            }
            self.retire()?;
        }
        self.idle.pop().map_or_else(|| Commands::new(device), Ok)
    }

    /// Takes back the oldest batch, which is done.
    fn retire(&mut self) -> VkResult<()> {
        if let Some((epoch, mut batch)) = self.flying.pop_front() {
            self.done = epoch;
            batch.reset()?;
            self.idle.push(batch);
        }
        Ok(())
    }

    fn wait_for(&mut self, epoch: u64) -> VkResult<()> {
        if epoch <= self.done {
            return Ok(());
        }
        if self.flying.back().is_none_or(|(last, _)| *last < epoch) {
            self.submit()?;
        }
        self.waits += 1;
        while self.done < epoch {
            let Some((_, batch)) = self.flying.front() else { break };
            batch.wait()?;
            self.retire()?;
        }
        Ok(())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // Batches must not be destroyed while they run.
        self.wait_idle();
    }
}

#[cfg(test)]
mod tests {
    use crate::{Backend, Call, Error, Memory, Vulkan};
    use ash::vk;
    use std::io::Write as _;

    #[test]
    fn a_lost_device_is_told_by_the_next_read() {
        let device = match Vulkan::new(1) {
            Ok(device) => device,
            Err(why) => {
                // Where it must not be skipped, `tests/ops` fails.
                let _ = writeln!(std::io::stderr(), "SKIPPED: no Vulkan device: {why}");
                return;
            }
        };
        let x = device.buffer(3).unwrap();
        let mut y = device.buffer(3).unwrap();
        device.run(Call::AddAssign { x: &x, y: &mut y }).unwrap();
        device.recorder.record(&[&x.memory], &y.memory, |_| Err(vk::Result::ERROR_DEVICE_LOST));
        // Calls go on without an error and without effect on the device.
        device.run(Call::AddAssign { x: &x, y: &mut y }).unwrap();
        device.run(Call::Scale { factor: 2.0, x: &mut y }).unwrap();
        device.run(Call::Zero { x: &mut y }).unwrap();
        assert_eq!(device.recorded(), 1);
        for _ in 0..2 {
            let read = device.read(&y, &mut [0.0; 3]);
            assert!(matches!(&read, Err(Error::Device(why)) if why.contains("lost")), "{read:?}");
        }
    }
}
