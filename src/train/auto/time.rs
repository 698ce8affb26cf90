//! Times that people write and read, and how many steps fit into one.

use crate::error::{Error, Result};
use std::time::Duration;

/// Share of a time that training may take; evaluations and writing need the rest.
const FOR_STEPS: f64 = 0.85;

/// Longest time that is read, in hours.
const MOST_HOURS: f64 = 87_600.0;

/// Reads a time such as `90s`, `10m`, `1.5h`; a bare number is one of seconds.
///
/// # Errors
/// It is none, not above 0, or above ten years.
pub fn parse_time(text: &str) -> Result<Duration> {
    let text = text.trim();
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[number.len()..] {
        "" | "s" => Some(1.0),
        "m" | "min" => Some(60.0),
        "h" => Some(3600.0),
        _ => None,
    };
    let seconds = number.parse::<f64>().ok().zip(unit).map(|(number, unit)| number * unit);
    match seconds {
        Some(seconds) if seconds > 3600.0 * MOST_HOURS => {
            Err(Error::config("time", format!("a time of at most ten years (`{MOST_HOURS}h`)"), text))
        }
        Some(seconds) if seconds > 0.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(Error::config("time", "a time above 0, such as `90s`, `10m` or `2h`", text)),
    }
}

/// `seconds` in words, as exactly as a guess is.
#[must_use]
pub fn spoken(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{:.0} s", s.max(1.0).round()),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Steps of `step` seconds that fit into what is left of a time of `seconds`; at least one.
pub(crate) fn steps_within(seconds: f64, step: f64) -> u64 {
    // A float to an integer saturates.
    ((seconds * FOR_STEPS / step.max(1e-9)) as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_said() {
        for (text, seconds) in [("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0), (" 30 ", 30.0), ("2min", 120.0)] {
            assert_eq!(parse_time(text).unwrap().as_secs_f64(), seconds, "{text}");
        }
        for text in ["", "m", "0", "-5m", "ten", "5 d", "inf", "nan", "1e99h"] {
            let error = parse_time(text).unwrap_err().to_string();
            assert!(error.contains("`time`"), "{text}: {error}");
        }
        for text in ["99999999h", "1e99h"] {
            let error = parse_time(text).unwrap_err().to_string();
            assert!(error.contains("at most ten years") && !error.contains("above 0"), "{text}: {error}");
        }
        assert_eq!([0.2, 89.0, 90.0, 600.0, 7200.0].map(spoken), ["1 s", "89 s", "2 min", "10 min", "2.0 h"]);
        assert_eq!((steps_within(100.0, 1.0), steps_within(-3.0, 1.0), steps_within(0.1, 9.0)), (85, 1, 1));
    }
}
