//! What calls take beside their arguments. Each kernel's file has a function that says so; `cost` in `mod.rs` asks it.

/// Bytes, rounded up where it is easier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    /// Taken while the call runs.
    pub passing: usize,
    /// Activations in bf16, whose memory the calling thread keeps for the next call.
    pub rounded: usize,
    /// Scratch in f32 and in bf16 that the calling thread keeps.
    pub own: [usize; 2],
    /// Scratch that each other thread keeps.
    pub others: [usize; 2],
}

impl Cost {
    /// Of so many values of scratch in f32 and in bf16, which only the calling thread takes if the work is `small`.
    pub fn scratch(floats: usize, halves: usize, small: bool) -> Self {
        let own = [size_of::<f32>() * floats, size_of::<u16>() * halves];
        Self { own, others: if small { [0; 2] } else { own }, ..Self::default() }
    }

    /// Of one after the other.
    pub fn then(self, next: Self) -> Self {
        let larger = |a: [usize; 2], b: [usize; 2]| [a[0].max(b[0]), a[1].max(b[1])];
        Self {
            passing: self.passing.max(next.passing),
            rounded: self.rounded.max(next.rounded),
            own: larger(self.own, next.own),
            others: larger(self.others, next.others),
        }
    }
}
