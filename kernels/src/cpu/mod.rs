//! CPU backend.
/// The CPU.
pub struct Cpu;
