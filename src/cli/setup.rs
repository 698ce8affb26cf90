//! `pocketlora completions` and `pocketlora man`: what a shell and a system know of the command; and its long version.

use super::{command, names};
use crate::error::{Error, Result};
use crate::format::{create_folder, write_bytes};
use clap_complete::Shell;
use std::fmt::Write as _;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell: a line in its start file loads them, such as `source <(pocketlora completions bash)`.
    shell: Shell,
}

#[derive(clap::Args)]
pub(super) struct ManArgs {
    /// Folder for the pages, one for each command.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
}

pub(super) fn completions(args: &CompletionsArgs) {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "pocketlora", &mut script);
    print!("{}", String::from_utf8_lossy(&script));
}

pub(super) fn man(args: &ManArgs) -> Result<()> {
    create_folder(&args.out)?;
    let mut root = command().disable_help_subcommand(true);
    root.build();
    let mut pages = vec![("pocketlora".to_owned(), root.clone())];
    let named = |command: &clap::Command| format!("pocketlora-{}", command.get_name());
    pages.extend(root.get_subcommands().map(|one| (named(one), one.clone().display_name(named(one)))));
    for (name, command) in &pages {
        let (path, mut page) = (args.out.join(format!("{name}.1")), Vec::new());
        clap_mangen::Man::new(command.clone()).render(&mut page).map_err(|e| Error::io("make", &path, e))?;
        write_bytes(&path, &page)?;
    }
    println!("{}: {} pages", args.out.display(), pages.len());
    Ok(())
}

/// The version, the commit where the build was told of one (`POCKETLORA_COMMIT`), and what was built in.
pub(super) fn version() -> String {
    let mut text = env!("CARGO_PKG_VERSION").to_owned();
    if let Some(commit) = option_env!("POCKETLORA_COMMIT") {
        let _ = write!(text, " (commit {commit})");
    }
    let features = [
        ("hub", cfg!(feature = "hub")),
        ("metrics", cfg!(feature = "metrics")),
        ("bench", cfg!(feature = "bench")),
        ("charts", cfg!(feature = "charts")),
        ("seal", cfg!(feature = "seal")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("ggml", cfg!(feature = "ggml")),
    ];
    let named: Vec<_> = features.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
    let (features, system) = (named.join(", "), [std::env::consts::ARCH, std::env::consts::OS].join("-"));
    let _ = write!(text, "\nfeatures: {features}\nbuilt for: {system}");
    text
}
