//! What the library promises, area by area. One program holds these tests, because each program links the whole library
//! anew, and because tests of one program share the processor's cores. Tests that watch a whole process are apart.

#[path = "../common/mod.rs"]
mod common;

mod adapters;
mod answers;
mod batch;
mod begun;
mod bottleneck;
mod chats;
mod checkpoint;
mod compressed;
mod engine;
#[cfg(feature = "metrics")]
mod eval;
mod exchange;
mod families;
mod gguf;
mod golden;
mod head;
mod in_memory;
mod keep;
mod layer_methods;
mod lora_kin;
mod merge;
mod methods;
mod mxfp4;
mod packed;
mod peft_curve;
mod places;
#[cfg(feature = "hub")]
mod pull;
mod quantize;
mod routing;
mod run_folder;
mod runs;
mod samples;
mod smollm2;
mod together;
mod training;
