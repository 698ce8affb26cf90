//! A command buffer with what its work needs until it is done.

#![allow(unsafe_code, reason = "calls into the Vulkan driver")]

use super::device::Device;
use super::memory::Span;
use super::pipeline::{BINDINGS, Job, Pipelines};
use ash::prelude::VkResult;
use ash::vk;
use std::sync::Arc;

/// Dispatches of a batch: some layers' worth, so that the device starts while the host still records.
pub(super) const DISPATCHES: usize = 128;

/// Recorded by one thread at a time, then submitted, then used again.
pub(super) struct Commands {
    device: Arc<Device>,
    pool: vk::CommandPool,
    commands: vk::CommandBuffer,
    sets: vk::DescriptorPool,
    pub fence: vk::Fence,
    /// All that the commands refer to: a buffer that is dropped meanwhile stays until the device is done.
    keep: Vec<Arc<Span>>,
    dispatches: usize,
}

impl Commands {
    pub fn new(device: &Arc<Device>) -> VkResult<Self> {
        let mut batch = Self {
            device: Arc::clone(device),
            pool: vk::CommandPool::null(),
            commands: vk::CommandBuffer::null(),
            sets: vk::DescriptorPool::null(),
            fence: vk::Fence::null(),
            keep: Vec::new(),
            dispatches: 0,
        };
        let sizes = [vk::DescriptorPoolSize {
            ty: vk::DescriptorType::STORAGE_BUFFER,
            descriptor_count: (DISPATCHES * BINDINGS) as u32,
        }];
        let pool = vk::CommandPoolCreateInfo::default().queue_family_index(device.family);
        let sets = vk::DescriptorPoolCreateInfo::default().max_sets(DISPATCHES as u32).pool_sizes(&sizes);
        // SAFETY: the device is alive; `Drop` destroys what was made when a later step fails.
        unsafe {
            batch.pool = device.raw.create_command_pool(&pool, None)?;
            let commands = vk::CommandBufferAllocateInfo::default().command_pool(batch.pool).command_buffer_count(1);
            batch.commands = device.raw.allocate_command_buffers(&commands)?[0];
            batch.sets = device.raw.create_descriptor_pool(&sets, None)?;
            batch.fence = device.raw.create_fence(&vk::FenceCreateInfo::default(), None)?;
        }
        Ok(batch)
    }

    pub fn begin(&mut self) -> VkResult<()> {
        let info = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: a new or reset command buffer.
        unsafe { self.device.raw.begin_command_buffer(self.commands, &info) }
    }

    pub fn is_full(&self) -> bool {
        self.dispatches == DISPATCHES
    }

    /// Lets what follows see what the device wrote before, in this batch or an earlier one, and write what it read.
    pub fn barrier(&self) {
        let stages = vk::PipelineStageFlags::COMPUTE_SHADER | vk::PipelineStageFlags::TRANSFER;
        let wrote = vk::AccessFlags::SHADER_WRITE | vk::AccessFlags::TRANSFER_WRITE;
        self.barrier_between(stages, wrote, stages, wrote | vk::AccessFlags::SHADER_READ);
    }

    fn barrier_between(
        &self,
        before: vk::PipelineStageFlags,
        wrote: vk::AccessFlags,
        after: vk::PipelineStageFlags,
        access: vk::AccessFlags,
    ) {
        let memory = [vk::MemoryBarrier::default().src_access_mask(wrote).dst_access_mask(access)];
        let flags = vk::DependencyFlags::empty();
        // SAFETY: the command buffer is being recorded, as for all commands below.
        unsafe { self.device.raw.cmd_pipeline_barrier(self.commands, before, after, flags, &memory, &[], &[]) };
    }

    /// Has some work groups do a job; panics if a buffer is too short for it.
    pub fn dispatch(
        &mut self,
        pipelines: &Pipelines,
        job: &Job,
        buffers: [&Arc<Span>; BINDINGS],
        groups: u32,
    ) -> VkResult<()> {
        let long_enough = buffers.iter().zip(job.words()).all(|(memory, words)| words <= memory.size / 4);
        assert!(long_enough, "a buffer is too short for {job:?}");
        let raw = &self.device.raw;
        let layouts = [pipelines.set_layout];
        let info = vk::DescriptorSetAllocateInfo::default().descriptor_pool(self.sets).set_layouts(&layouts);
        let infos = buffers.map(|m| [vk::DescriptorBufferInfo { buffer: m.buffer, offset: m.offset, range: m.size }]);
        let constants: Vec<u8> = job.constants().iter().flat_map(|word| word.to_ne_bytes()).collect();
        let compute = vk::PipelineBindPoint::COMPUTE;
        // SAFETY: the pool has room for `DISPATCHES` sets; ranges lie within their buffers and are aligned, and `keep`
        // holds them until the work is done. Constants fit the layout's range. With these constants the shader stays within
        // the words that the assertion above asked for.
        unsafe {
            let set = raw.allocate_descriptor_sets(&info)?[0];
            let writes: [_; BINDINGS] = std::array::from_fn(|i| {
                vk::WriteDescriptorSet::default()
                    .dst_set(set)
                    .dst_binding(i as u32)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .buffer_info(&infos[i])
            });
            raw.update_descriptor_sets(&writes, &[]);
            raw.cmd_bind_pipeline(self.commands, compute, pipelines.get(job.shader()));
            raw.cmd_bind_descriptor_sets(self.commands, compute, pipelines.layout, 0, &[set], &[]);
            let stage = vk::ShaderStageFlags::COMPUTE;
            raw.cmd_push_constants(self.commands, pipelines.layout, stage, 0, &constants);
            raw.cmd_dispatch(self.commands, groups, 1, 1);
        }
        self.keep.extend(buffers.map(Arc::clone));
        self.dispatches += 1;
        Ok(())
    }

    /// Zeros all of `memory`.
    pub fn zero(&mut self, memory: &Arc<Span>) {
        // SAFETY: the range lies within its buffer and is a multiple of four; `keep` holds it until the work is done.
        unsafe { self.device.raw.cmd_fill_buffer(self.commands, memory.buffer, memory.offset, memory.size, 0) };
        self.keep.push(Arc::clone(memory));
        self.dispatches += 1;
    }

    /// Hands the work to the device. The caller has the queue to itself.
    pub fn submit(&mut self) -> VkResult<()> {
        // A fence alone does not make writes visible to the host.
        let stages = vk::PipelineStageFlags::COMPUTE_SHADER | vk::PipelineStageFlags::TRANSFER;
        let wrote = vk::AccessFlags::SHADER_WRITE | vk::AccessFlags::TRANSFER_WRITE;
        let host = vk::AccessFlags::HOST_READ | vk::AccessFlags::HOST_WRITE;
        self.barrier_between(stages, wrote, vk::PipelineStageFlags::HOST, host);
        let commands = [self.commands];
        let info = [vk::SubmitInfo::default().command_buffers(&commands)];
        // SAFETY: the recording is complete, the fence is not in use, and the caller guards the queue.
        unsafe {
            self.device.raw.end_command_buffer(self.commands)?;
            self.device.raw.queue_submit(self.device.queue, &info, self.fence)
        }
    }

    /// Whether the device is done.
    pub fn is_done(&self) -> VkResult<bool> {
        // SAFETY: the fence is alive.
        unsafe { self.device.raw.get_fence_status(self.fence) }
    }

    pub fn wait(&self) -> VkResult<()> {
        // SAFETY: the fence is alive and was submitted.
        unsafe { self.device.raw.wait_for_fences(&[self.fence], true, u64::MAX) }
    }

    /// Lets go of what the work used, once it is done, and makes ready for the next.
    pub fn reset(&mut self) -> VkResult<()> {
        self.keep.clear();
        self.dispatches = 0;
        let raw = &self.device.raw;
        // SAFETY: the device is done with all of it.
        unsafe {
            raw.reset_fences(&[self.fence])?;
            raw.reset_command_pool(self.pool, vk::CommandPoolResetFlags::empty())?;
            raw.reset_descriptor_pool(self.sets, vk::DescriptorPoolResetFlags::empty())
        }
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        // SAFETY: the recorder waited for the device. Null handles are ignored; command buffers go with their pool.
        unsafe {
            self.device.raw.destroy_fence(self.fence, None);
            self.device.raw.destroy_descriptor_pool(self.sets, None);
            self.device.raw.destroy_command_pool(self.pool, None);
        }
    }
}
