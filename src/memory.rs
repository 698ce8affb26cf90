//! How much memory the process holds, dirty and mapped told apart.

/// Anonymous (dirty) bytes resident now: what the system cannot drop and reload. `None` where the system does not
/// tell without private interfaces.
#[must_use]
pub fn anonymous_bytes() -> Option<u64> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    None
}

/// The highest of the samples taken. Work samples where it is at its fullest: in the middle of a backward pass, after
/// a prompt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Peak {
    bytes: Option<u64>,
    ignored: bool,
}

impl Peak {
    /// One that does not look, for work that holds nothing.
    #[must_use]
    pub fn ignored() -> Self {
        Self { bytes: None, ignored: true }
    }

    /// Looks now.
    pub fn sample(&mut self) {
        if !self.ignored {
            self.bytes = self.bytes.max(anonymous_bytes());
        }
    }

    /// The highest so far, in bytes.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        self.bytes
    }
}
