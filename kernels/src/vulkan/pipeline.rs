//! The shaders, compiled for the device.
//!
//! All have the same interface: two storage buffers that they read, one that they write, and some 32-bit constants.
//! Three bindings are fewer than the four that the poorest device has, and one layout serves all.

#![allow(unsafe_code, reason = "calls into the Vulkan driver")]

use super::device::Device;
use super::device_error;
use crate::Error;
use ash::vk;
use std::io::Cursor;
use std::sync::Arc;

/// Storage buffers of a shader; the last one is written.
pub(super) const BINDINGS: usize = 3;
/// Bytes of constants, which every device has.
const CONSTANTS: u32 = 128;
/// Invocations of a work group, as `shaders/shared/group.glsl` has it.
pub(super) const GROUP: usize = 64;

/// One of our shaders; the number is its place in [`CODE`].
#[derive(Clone, Copy)]
pub(super) enum Shader {
    Add,
    Nf4Matvec,
    RmsNorm,
}

/// A shader with its constants, from which follows how much of its buffers it touches.
#[derive(Clone, Copy, Debug)]
pub(super) enum Job {
    /// Of so many elements; to add to the output if `in_place`.
    Add {
        len: u32,
        in_place: bool,
    },
    /// A product with one token; places of the weight's parts as in [`super::matrix::Blocks`].
    Nf4Matvec {
        rows: u32,
        cols: u32,
        accumulate: bool,
        places: [u32; 7],
    },
    RmsNorm {
        rows: u32,
        width: u32,
        eps: f32,
    },
}

impl Job {
    pub fn shader(&self) -> Shader {
        match self {
            Self::Add { .. } => Shader::Add,
            Self::Nf4Matvec { .. } => Shader::Nf4Matvec,
            Self::RmsNorm { .. } => Shader::RmsNorm,
        }
    }

    /// As the shader declares them.
    pub fn constants(&self) -> Vec<u32> {
        match *self {
            Self::Add { len, in_place } => vec![len, u32::from(in_place)],
            Self::Nf4Matvec { rows, cols, accumulate, places } => {
                [&[rows, cols, u32::from(accumulate)][..], &places].concat()
            }
            Self::RmsNorm { rows, width, eps } => vec![rows, width, eps.to_bits()],
        }
    }

    /// Words of 32 bits that it may touch of each buffer, counted from the first.
    pub fn words(&self) -> [u64; BINDINGS] {
        match *self {
            Self::Add { len, .. } => [u64::from(len); BINDINGS],
            Self::Nf4Matvec { rows, cols, places, .. } => {
                let elements = u64::from(rows) * u64::from(cols);
                let [packed_at, scales_at, nested_at, block_log2, nested_block, ..] = places.map(u64::from);
                let blocks = elements.div_ceil(1 << block_log2);
                let (map, scales, nested) = match nested_block {
                    0 => (0, blocks, 0),
                    nested => (256, blocks.div_ceil(4), blocks.div_ceil(nested)),
                };
                let parts = [16 + map, nested_at + nested, scales_at + scales, packed_at + elements.div_ceil(8)];
                [parts.into_iter().max().unwrap_or(0), u64::from(cols), u64::from(rows)]
            }
            Self::RmsNorm { rows, width, .. } => {
                let all = u64::from(rows) * u64::from(width);
                [u64::from(width), all, all]
            }
        }
    }
}

/// Compiled by `.ci/run shaders`, which also checks that they are what the sources say.
const CODE: [&[u8]; 3] = [
    include_bytes!("../../shaders/add.spv"),
    include_bytes!("../../shaders/nf4_matvec.spv"),
    include_bytes!("../../shaders/rms_norm.spv"),
];

/// A pipeline for each shader.
pub(super) struct Pipelines {
    device: Arc<Device>,
    pub set_layout: vk::DescriptorSetLayout,
    pub layout: vk::PipelineLayout,
    raw: Vec<vk::Pipeline>,
}

impl Pipelines {
    pub fn new(device: &Arc<Device>) -> Result<Self, Error> {
        let failed = device_error("vulkan pipelines");
        let mut pipelines = Self {
            device: Arc::clone(device),
            set_layout: vk::DescriptorSetLayout::null(),
            layout: vk::PipelineLayout::null(),
            raw: Vec::new(),
        };
        let bindings: [_; BINDINGS] = std::array::from_fn(|i| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(i as u32)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        });
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: the device is alive, as for all calls below; `Drop` destroys what was made when a later step fails.
        pipelines.set_layout = unsafe { device.raw.create_descriptor_set_layout(&info, None) }.map_err(&failed)?;
        let constants = [vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(CONSTANTS)];
        let sets = [pipelines.set_layout];
        let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets).push_constant_ranges(&constants);
        // SAFETY: as above.
        pipelines.layout = unsafe { device.raw.create_pipeline_layout(&info, None) }.map_err(&failed)?;
        for code in CODE {
            let pipeline = pipeline(device, pipelines.layout, code)?;
            pipelines.raw.push(pipeline);
        }
        Ok(pipelines)
    }

    pub fn get(&self, shader: Shader) -> vk::Pipeline {
        self.raw[shader as usize]
    }
}

fn pipeline(device: &Device, layout: vk::PipelineLayout, code: &[u8]) -> Result<vk::Pipeline, Error> {
    let words = ash::util::read_spv(&mut Cursor::new(code)).map_err(|e| Error::Device(format!("shader: {e}")))?;
    let info = vk::ShaderModuleCreateInfo::default().code(&words);
    // SAFETY: the code is our own, valid by `spirv-val`, and its interface is that of `layout`. The module may go as
    // soon as the pipeline is there.
    unsafe {
        let module = device.raw.create_shader_module(&info, None).map_err(device_error("vulkan shader"))?;
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main");
        let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout)];
        let made = device.raw.create_compute_pipelines(vk::PipelineCache::null(), &info, None);
        device.raw.destroy_shader_module(module, None);
        // One was asked for: either it is there or none is.
        made.map(|made| made[0]).map_err(|(_, result)| device_error("vulkan pipeline")(result))
    }
}

impl Drop for Pipelines {
    fn drop(&mut self) {
        // SAFETY: the recorder, which owns this, has waited for all work. Null handles are ignored.
        unsafe {
            for pipeline in &self.raw {
                self.device.raw.destroy_pipeline(*pipeline, None);
            }
            self.device.raw.destroy_pipeline_layout(self.layout, None);
            self.device.raw.destroy_descriptor_set_layout(self.set_layout, None);
        }
    }
}
