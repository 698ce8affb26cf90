//! What a record must say of where it was taken.

use serde::Serialize;

/// The machine and the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The processor as the system names it, or the architecture where it does not.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Architecture and system.
    pub platform: String,
    /// Version of Pocketlora.
    pub version: String,
    /// Date in UTC, `YYYY-MM-DD`.
    pub date: String,
}

impl Machine {
    /// This one, now.
    #[must_use]
    pub fn here() -> Self {
        Self {
            cpu: cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            platform: format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            date: crate::clock::strftime_now("%Y-%m-%d"),
        }
    }
}

/// From `/proc/cpuinfo`: x86 has `model name`; ARM has numbers of implementer and part, which databases explain. Virtual
/// machines may hide the model, so that family and model number are added.
fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let value = |key: &str| {
        let of = |line: &str| line.split_once(':').filter(|(k, _)| k.trim() == key).map(|(_, v)| v.trim().to_owned());
        text.lines().find_map(of).filter(|v| !v.is_empty())
    };
    match (value("model name"), value("cpu family"), value("model")) {
        (Some(name), Some(family), Some(model)) => Some(format!("{name} (family {family}, model {model})")),
        (Some(name), ..) => Some(name),
        _ => Some(format!("implementer {} part {}", value("CPU implementer")?, value("CPU part")?)),
    }
}
