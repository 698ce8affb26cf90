//! The library as C sees it: the header, and programs in C that are compiled with the system's compiler.

#[path = "../common/mod.rs"]
mod common;
mod header;
#[cfg(target_os = "linux")]
mod programs;
