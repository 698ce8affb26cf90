//! The Vulkan backend, experimental: [`Vulkan`] records operations that have a shader and leaves the others to the CPU.
//!
//! | file | what |
//! |---|---|
//! | `instance`, `device` | the library, found at run time; the device and its limits; validation on request |
//! | `memory`, `buffer`, `matrix` | memory that host and device share, and what lies in it |
//! | `pipeline`, `ops` | the shaders, and one function for each |
//! | `batch`, `recorder` | recorded work: barriers, submission, waiting |
//!
//! Any device of Vulkan 1.1 will do; no feature and no extension is asked for. An operation without a shader runs on
//! the CPU's kernels in the same memory, once the device is done with the buffers that it touches: correct, but the
//! device idles meanwhile. [`Vulkan::waits`] counts how often that happens.

mod backend;
mod batch;
mod buffer;
mod device;
mod instance;
mod matrix;
mod memory;
mod ops;
mod pipeline;
mod recorder;

pub use buffer::Buffer;
pub use instance::Validation;
pub use matrix::Matrix;

use crate::{Cpu, Error};
use device::Device;
use memory::Heap;
use recorder::Recorder;
use std::sync::Arc;

/// A Vulkan device, with the CPU beside it.
pub struct Vulkan {
    cpu: Cpu,
    /// Waits for the device when dropped, hence before what its work uses.
    recorder: Recorder,
    heap: Arc<Heap>,
    device: Arc<Device>,
}

impl Vulkan {
    /// The best device of this machine, and `threads` threads, all cores if 0, for operations without a shader.
    ///
    /// `POCKETLORA_VULKAN_VALIDATE=1` has every call checked by the Vulkan validation layers, see
    /// [`Vulkan::validation`].
    ///
    /// # Errors
    /// [`Error::Device`] if there is no Vulkan 1.1 here, or no validation layer although it was asked for.
    pub fn new(threads: usize) -> Result<Self, Error> {
        let device = Arc::new(Device::new()?);
        let recorder = Recorder::new(&device)?;
        let heap = Heap::new(Arc::clone(&device));
        Ok(Self { cpu: Cpu::new(threads), recorder, heap, device })
    }

    /// The device's name, as its driver gives it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.device.name
    }

    /// Operations that the device was given so far; all others ran on the CPU.
    #[must_use]
    pub fn recorded(&self) -> u64 {
        self.recorder.recorded()
    }

    /// Times that the host waited for the device so far: for a read, for an operation without a shader, or because
    /// more work was recorded than may wait.
    #[must_use]
    pub fn waits(&self) -> u64 {
        self.recorder.waits()
    }

    /// Bytes allocated for buffers and 4-bit weights, what is free in them included.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.heap.allocated()
    }

    /// What the validation layers complain of, if they are on.
    #[must_use]
    pub fn validation(&self) -> Option<Arc<Validation>> {
        self.device.validation()
    }
}

/// Names the step that failed.
fn device_error(what: &str) -> impl Fn(ash::vk::Result) -> Error {
    move |result| Error::Device(format!("{what}: {result}"))
}
