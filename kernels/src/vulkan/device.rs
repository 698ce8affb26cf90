//! The device that runs the shaders, its queue and its limits.

#![allow(unsafe_code, reason = "calls into the Vulkan driver")]

use super::device_error;
use super::instance::{Instance, Validation};
use crate::Error;
use ash::vk;
use std::cmp::Reverse;
use std::sync::Arc;

/// A device with one queue.
pub(super) struct Device {
    pub raw: ash::Device,
    /// To be used under the recorder's lock only.
    pub queue: vk::Queue,
    pub family: u32,
    pub name: String,
    pub limits: DeviceLimits,
    /// Destroyed after the device, hence last.
    instance: Instance,
}

/// What a device can do, as far as we ask.
pub(super) struct DeviceLimits {
    /// Bytes to which the start of a storage buffer must be aligned, a power of two.
    pub alignment: u64,
    /// Bytes of a storage buffer that a shader can see, 128 MiB at least.
    pub range: u64,
    /// Work groups of a dispatch, 65535 at least.
    pub groups: u32,
    /// Bytes of an allocation, 1 GiB at least.
    pub allocation: u64,
    /// Memory types that host and device see alike without flushing, the best first.
    pub memory_types: Vec<u32>,
}

/// A device that would do.
struct Candidate {
    raw: vk::PhysicalDevice,
    family: u32,
    kind: vk::PhysicalDeviceType,
    name: String,
    limits: DeviceLimits,
}

impl Device {
    /// The best device of this machine: the host shares its buffers, so one with memory in common comes first.
    pub fn new() -> Result<Self, Error> {
        let instance = Instance::new()?;
        // SAFETY: the instance is alive, as for all calls on it below.
        let found = unsafe { instance.raw.enumerate_physical_devices() }.map_err(device_error("vulkan devices"))?;
        let best = found.into_iter().filter_map(|raw| candidate(&instance.raw, raw)).min_by_key(|candidate| {
            match candidate.kind {
                vk::PhysicalDeviceType::INTEGRATED_GPU => 0,
                vk::PhysicalDeviceType::DISCRETE_GPU => 1,
                vk::PhysicalDeviceType::VIRTUAL_GPU => 2,
                _ => 3,
            }
        });
        let Some(Candidate { raw, family, name, limits, .. }) = best else {
            return Err(Error::Device("no device offers Vulkan 1.1, a compute queue and coherent memory".to_owned()));
        };
        let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
        let info = vk::DeviceCreateInfo::default().queue_create_infos(&queues);
        // SAFETY: the family is one of this device's; `info` asks for no feature and no extension.
        let raw = unsafe { instance.raw.create_device(raw, &info, None) }.map_err(device_error("vulkan device"))?;
        // SAFETY: the device was created with this queue.
        let queue = unsafe { raw.get_device_queue(family, 0) };
        Ok(Self { raw, queue, family, name, limits, instance })
    }

    pub fn validation(&self) -> Option<Arc<Validation>> {
        self.instance.validation()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: whatever was made on the device holds an `Arc` of this and is gone. The recorder waited for its work.
        unsafe { self.raw.destroy_device(None) };
    }
}

fn candidate(instance: &ash::Instance, raw: vk::PhysicalDevice) -> Option<Candidate> {
    // SAFETY: `raw` is a device of this live instance; the version is checked before the call that needs 1.1.
    let (properties, families, memory) = unsafe {
        (
            instance.get_physical_device_properties(raw),
            instance.get_physical_device_queue_family_properties(raw),
            instance.get_physical_device_memory_properties(raw),
        )
    };
    if properties.api_version < vk::API_VERSION_1_1 {
        return None;
    }
    let family = families.iter().position(|family| family.queue_flags.contains(vk::QueueFlags::COMPUTE))?;
    let mut maintenance = vk::PhysicalDeviceMaintenance3Properties::default();
    let mut more = vk::PhysicalDeviceProperties2::default().push_next(&mut maintenance);
    // SAFETY: as above.
    unsafe { instance.get_physical_device_properties2(raw, &mut more) };
    let kind = properties.device_type;
    let limits = DeviceLimits {
        // A cache line at least, so that neighbours do not share one.
        alignment: properties.limits.min_storage_buffer_offset_alignment.max(64),
        range: properties.limits.max_storage_buffer_range.into(),
        groups: properties.limits.max_compute_work_group_count[0],
        allocation: maintenance.max_memory_allocation_size,
        memory_types: shared_memory_types(&memory, kind == vk::PhysicalDeviceType::DISCRETE_GPU),
    };
    let name = properties.device_name_as_c_str().map_or_else(|_| String::new(), |n| n.to_string_lossy().into_owned());
    (!limits.memory_types.is_empty()).then_some(Candidate { raw, family: family as u32, kind, name, limits })
}

/// Memory types that the host sees, by preference. The host reads them in operations without a shader, so they should
/// be cached; a discrete GPU's own memory is small from the host's side and slow to read.
fn shared_memory_types(memory: &vk::PhysicalDeviceMemoryProperties, discrete: bool) -> Vec<u32> {
    use vk::MemoryPropertyFlags as Flags;
    let flags = |i: &u32| memory.memory_types[*i as usize].property_flags;
    let shared = |i: &u32| flags(i).contains(Flags::HOST_VISIBLE | Flags::HOST_COHERENT);
    let mut types: Vec<u32> = (0..memory.memory_type_count).filter(shared).collect();
    types.sort_by_key(|i| {
        let (local, cached) = (flags(i).contains(Flags::DEVICE_LOCAL), flags(i).contains(Flags::HOST_CACHED));
        Reverse(if discrete { (cached, local) } else { (local, cached) })
    });
    types
}
