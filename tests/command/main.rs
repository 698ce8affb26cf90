//! The command line as people run it: a process with arguments, files, signals and an exit code.
#![cfg(feature = "cli")]

#[path = "../common/mod.rs"]
mod common;
mod fixture;

mod auto;
mod cache;
mod cli;
mod compose;
mod courses;
#[cfg(unix)] // signals
mod ends;
mod exchange;
mod gated;
mod merge;
mod mistakes;
mod prune;
mod ranks;
mod route;
mod said;
mod sealed;
mod strict;
mod study;
mod talk;
mod together;
