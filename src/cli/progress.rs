//! Progress bars on stderr; they hide themselves where it is not a terminal. They fit into 40 columns, as on a phone: a
//! line that wraps is not wiped away. What is told beside a bar has the rest of the line.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

const REDRAW: Duration = Duration::from_millis(120);

fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the templates here are valid");
    bar.set_style(style.progress_chars("━╸ "));
    bar.enable_steady_tick(REDRAW);
    bar
}

const BYTES: &str = "{prefix:<8} {bar:8} {percent}% of {decimal_total_bytes} {eta} {wide_msg}";
const COUNT: &str = "{prefix:<8} {bar:10} {pos}/{len} eta {eta} {wide_msg}";
const SPINNER: &str = "{prefix:<8} {spinner} {decimal_bytes} {elapsed} {wide_msg}";
const STEPS: &str = "{prefix:<8} {spinner} {elapsed} {wide_msg}";

/// A bar that counts bytes.
pub(super) fn bytes(total: u64, label: &str) -> ProgressBar {
    styled(ProgressBar::new(total), BYTES).with_prefix(label.to_owned())
}

/// A bar that counts things, with a message of the caller's.
pub(super) fn count(total: u64, label: &str) -> ProgressBar {
    styled(ProgressBar::new(total), COUNT).with_prefix(label.to_owned())
}

/// Shows what is done between the things that `bar` counts, under a label of its own; how long it takes is not known.
pub(super) fn pause(bar: &ProgressBar, label: &str) {
    bar.set_style(ProgressStyle::with_template(STEPS).expect("the templates here are valid"));
    bar.set_prefix(label.to_owned());
}

/// Counts on after [`pause`].
pub(super) fn resume(bar: &ProgressBar, label: &str) {
    let style = ProgressStyle::with_template(COUNT).expect("the templates here are valid");
    bar.set_style(style.progress_chars("━╸ "));
    bar.set_prefix(label.to_owned());
    bar.reset_eta();
}

/// A spinner for work of unknown length.
pub(super) fn spinner(label: &str) -> ProgressBar {
    styled(ProgressBar::new_spinner(), SPINNER).with_prefix(label.to_owned())
}

/// A spinner that tells what is being done.
pub(super) fn steps(label: &str) -> ProgressBar {
    styled(ProgressBar::new_spinner(), STEPS).with_prefix(label.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use indicatif::{ProgressDrawTarget, TermLike};
    use std::io;
    use std::sync::{Arc, Mutex};

    /// A terminal of some width that keeps the longest line.
    #[derive(Debug, Clone)]
    struct Narrow(u16, Arc<Mutex<usize>>);

    impl TermLike for Narrow {
        fn width(&self) -> u16 {
            self.0
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            let mut longest = self.1.lock().unwrap();
            *longest = text.chars().count().max(*longest);
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_bar_wraps() {
        for width in [40, 60, 80, 100, 200] {
            for (name, bar) in [
                ("bytes", bytes(105_454_432, "download")),
                ("count", count(12_000, "quantize")),
                ("spinner", spinner("download")),
                ("steps", steps("bench")),
            ] {
                let terminal = Narrow(width, Arc::default());
                bar.set_draw_target(ProgressDrawTarget::term_like(Box::new(terminal.clone())));
                bar.set_position(11_000);
                bar.set_message(
                    "loss 0.123, 1234 tok/s, 1234.5 MB of model.layers.29.self_attn.q_proj.weight ".repeat(2),
                );
                bar.tick();
                if name == "count" {
                    pause(&bar, "check");
                    bar.tick();
                    resume(&bar, "quantize");
                    bar.tick();
                }
                let longest = *terminal.1.lock().unwrap();
                assert!(longest > 20 && longest <= usize::from(width), "{name}: {longest} of {width} columns");
            }
        }
    }
}
