//! Progress bars on stderr; they hide themselves where it is not a terminal.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

const REDRAW: Duration = Duration::from_millis(120);

fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the templates here are valid");
    bar.set_style(style.progress_chars("━╸ "));
    bar.enable_steady_tick(REDRAW);
    bar
}

/// A bar that counts bytes.
pub(super) fn bytes(total: u64, label: &str) -> ProgressBar {
    let template =
        "{prefix:<12} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} eta {eta} {msg}";
    styled(ProgressBar::new(total), template).with_prefix(label.to_owned())
}

/// A bar that counts things, with a message of the caller's.
pub(super) fn count(total: u64, label: &str) -> ProgressBar {
    styled(ProgressBar::new(total), "{prefix:<12} {bar:30} {pos}/{len} eta {eta} {msg}").with_prefix(label.to_owned())
}

/// A spinner for work of unknown length.
pub(super) fn spinner(label: &str) -> ProgressBar {
    styled(ProgressBar::new_spinner(), "{prefix:<12} {spinner} {decimal_bytes} {elapsed} {msg}")
        .with_prefix(label.to_owned())
}

/// A spinner that tells what is being done.
pub(super) fn steps(label: &str) -> ProgressBar {
    styled(ProgressBar::new_spinner(), "{prefix:<12} {spinner} {elapsed} {msg}").with_prefix(label.to_owned())
}
