//! The `pocketlora` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    pocketlora::cli::run()
}
