//! From the tensors in training to files and back: checkpoints, snapshots and the adapter.

use super::best::FOLDER;
use super::checkpoint::{self, Loaded};
use super::optimizer::{bytes_of, floats};
use super::relora::Cycles;
use super::trained::Trained;
use super::{Observer, Trainer, allocate, run_folder};
use crate::adapter::{AdapterFile, Adapters, HostTensor, Kind, Stored, Tensors, is_first, replace_beside};
use crate::base::Base;
use crate::error::{Error, ErrorCode, Result};
use crate::format::{Entry, sweep};
use pocketlora_kernels::Backend;
use safetensors::Dtype;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

/// A run is not asked for a checkpoint by its age before that.
const FIRST: Duration = Duration::from_secs(1);
/// Checkpoints take at most one part in so many of a run's time, unless steps ask for them.
const SHARE: u32 = 20;

/// What stands in a checkpoint before the names of tensors that the adapter began with.
const BEGUN: &str = "first";

/// When time asks for a checkpoint.
pub(super) struct Pace {
    start: Instant,
    last: Instant,
    cost: Duration,
}

impl Pace {
    pub fn new() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, cost: Duration::ZERO }
    }

    /// Takes note of one that was written, or tried, and what it took.
    pub fn saved(&mut self, cost: Duration) {
        (self.last, self.cost) = (Instant::now(), cost);
    }

    /// Whether one is due, for a longest wait of `seconds`; never for 0.
    pub fn due(&self, seconds: u64) -> bool {
        seconds > 0 && self.last.elapsed() >= wait(Duration::from_secs(seconds), self.last - self.start, self.cost)
    }
}

/// Time from one checkpoint to the next: as long as the run was old at the last, so that a kill costs half of it at most.
fn wait(longest: Duration, age: Duration, cost: Duration) -> Duration {
    age.max(FIRST).min(longest).max(cost * SHARE)
}

/// Tensors in `file`, of an adapter in training, that stay as they are and that a checkpoint has to hold.
fn begun(file: &AdapterFile) -> impl Iterator<Item = (&String, &HostTensor)> {
    let all = file.method.begins_with().is_some();
    file.tensors.iter().filter(move |(name, _)| all || is_first(name))
}

impl<B: Backend> Trainer<B> {
    /// Goes to where the newest sound checkpoint in the output folder stands.
    ///
    /// # Errors
    /// There is none, all are broken, or it belongs to another run.
    pub fn resume(&mut self) -> Result<()> {
        let Loaded { facts, file, warning } = checkpoint::load(&self.out, &self.facts, &self.entries())?;
        let backend = &self.base.backend;
        for t in &mut self.tensors {
            let part = |prefix: &str| file.get(&format!("{prefix}.{}", t.spec.name)).map(|tensor| &tensor.bytes[..]);
            let values = floats(part("param")?);
            self.adapters.held_mut().update(backend, t.id, &mut |master| backend.write(master, &values));
            let layout = t.moments.layout(values.len());
            let parts: Vec<&[u8]> = layout.iter().map(|(prefix, ..)| part(prefix)).collect::<Result<_>>()?;
            t.moments.write(backend, &parts);
        }
        // What was taken from the base or the data is not computed once more: another machine's last digits may be others.
        let mut first = Tensors::new();
        for (name, tensor) in begun(&self.file) {
            let data = floats(&file.get(&format!("{BEGUN}.{name}"))?.bytes);
            first.insert(name.clone(), HostTensor { shape: tensor.shape.clone(), data });
        }
        if facts.step > 0 {
            self.beginning = None;
        }
        if let Some(allocator) = &mut self.allocator {
            allocator.counts.clone_from(&facts.grown);
            for (t, state) in self.tensors.iter().zip(&mut allocator.state) {
                for (part, values) in allocate::PARTS.iter().zip(state) {
                    *values = floats(&file.get(&format!("{part}.{}", t.spec.name))?.bytes);
                }
            }
        }
        if let Some(cycles) = &self.cycles {
            cycles.load(backend, &mut self.adapters, &file)?;
        }
        self.facts = facts;
        self.put(first)?;
        // A damaged newest one must not become the previous one, in place of a sound one.
        self.saved = warning.is_none();
        self.earlier = None;
        self.warnings.extend(warning);
        if self.facts.candidates.kept.is_some()
            && let Err(e) = AdapterFile::open(&self.out.join(FOLDER))
        {
            self.facts.candidates.kept = None;
            self.warnings.push(e);
        }
        Ok(())
    }

    /// What a checkpoint holds, in the order in which it is written and checked.
    fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for t in &self.tensors {
            let entry = |prefix: &str, dtype, shape| Entry { name: format!("{prefix}.{}", t.spec.name), dtype, shape };
            entries.push(entry("param", Dtype::F32, t.spec.shape.clone()));
            let layout = t.moments.layout(t.spec.values());
            entries.extend(layout.into_iter().map(|(prefix, dtype, len)| entry(prefix, dtype, vec![len])));
            if self.allocator.is_some() {
                entries.extend(allocate::PARTS.map(|part| entry(part, Dtype::F32, vec![t.spec.values()])));
            }
        }
        for (name, tensor) in begun(&self.file) {
            entries.push(Entry { name: format!("{BEGUN}.{name}"), dtype: Dtype::F32, shape: tensor.shape.clone() });
        }
        entries.extend(self.cycles.iter().flat_map(|cycles| cycles.entries(&self.adapters)));
        entries
    }

    /// Writes the state of the run beside where the adapter will be, one tensor at a time.
    ///
    /// # Errors
    /// The file cannot be written; the ones before it are kept then.
    pub fn save_checkpoint(&mut self) -> Result<()> {
        self.check_earlier()?;
        let entries = self.entries();
        self.allocator.iter().for_each(|allocator| self.facts.grown.clone_from(&allocator.counts));
        let Self { base, adapters, tensors, peak, allocator, cycles, file, .. } = self;
        let backend = &base.backend;
        checkpoint::save(&self.out, &self.facts, self.saved, entries, |sink| {
            for (i, t) in tensors.iter().enumerate() {
                sink.put(&format!("param.{}", t.spec.name), &bytes_of(&adapters.held().read(backend, t.id)?))?;
                let layout = t.moments.layout(t.spec.values());
                let mut prefixes = layout.iter().map(|(prefix, ..)| prefix);
                t.moments.read(backend, &mut |bytes| {
                    let prefix = prefixes.next().expect("a part for each in the layout");
                    peak.sample();
                    sink.put(&format!("{prefix}.{}", t.spec.name), bytes)
                })?;
                let state = allocator.as_ref().map(|allocator| &allocator.state[i]);
                for (part, values) in allocate::PARTS.iter().zip(state.into_iter().flatten()) {
                    sink.put(&format!("{part}.{}", t.spec.name), &bytes_of(values))?;
                }
            }
            for (name, tensor) in begun(file) {
                sink.put(&format!("{BEGUN}.{name}"), &bytes_of(&tensor.data))?;
            }
            if let Some(cycles) = cycles {
                cycles.save(backend, adapters, &mut |name, bytes| {
                    peak.sample();
                    sink.put(name, bytes)
                })?;
            }
            peak.sample();
            Ok(())
        })?;
        self.saved = true;
        Ok(())
    }

    /// Writes a checkpoint, or warns that it could not be: the next one may fit again.
    pub(super) fn try_checkpoint(&mut self, observer: &mut dyn Observer) -> Result<()> {
        match self.save_checkpoint() {
            Err(e) if e.code() == ErrorCode::Io => observer.on_warning(&e),
            other => other?,
        }
        Ok(())
    }

    /// Writes the run's result and removes what it no longer needs.
    pub(super) fn finish(&mut self, observer: &mut dyn Observer) -> Result<()> {
        // Memory of the last step's activations serves what is read for writing.
        self.pool.clear();
        crate::mmap::release_freed();
        self.ready = false;
        if !self.saved && AdapterFile::exists(&self.out) {
            // An older adapter is about to be replaced; from here on a kill costs neither run.
            self.try_checkpoint(observer)?;
        }
        let best = self.out.join(FOLDER);
        if self.rule().must_pass && self.facts.candidates.kept.is_none() {
            let message = "expected an adapter that passed `max-forgetting`, got none that could be written; free some \
                           space and train again";
            return Err(Error::new(ErrorCode::Io, format!("`{}`", best.display()), message));
        }
        self.room = None;
        let mut written = self.write_result();
        if written.as_ref().is_err_and(|e| e.code() == ErrorCode::Io) && self.saved {
            // The newest checkpoint is enough to come back to this point; the one before it takes room.
            checkpoint::remove_previous(&self.out)?;
            written = self.write_result();
        }
        written?;
        checkpoint::remove(&self.out)?;
        self.leave_lessons()?;
        if self.facts.candidates.kept.is_some() {
            AdapterFile::remove(&best)?;
        }
        Ok(())
    }

    /// Writes the adapter that the run ends with.
    fn write_result(&mut self) -> Result<()> {
        if self.facts.candidates.kept.is_some() && self.rule().keeps() {
            AdapterFile::copy(&self.out.join(FOLDER), &self.out)?;
            self.peak.sample();
            return Ok(());
        }
        self.save_adapter()
    }

    /// The adapter as it is now, rounded as its file would hold it: for generating while training goes on.
    ///
    /// # Errors
    /// A value does not fit f16.
    pub fn snapshot(&self) -> Result<AdapterFile> {
        let Self { base, adapters, tensors, file, cycles, facts, .. } = self;
        snapshot(base, adapters, tensors, file, (cycles.as_ref(), facts.step))
    }

    /// Writes the adapter as it is now.
    ///
    /// # Errors
    /// A value does not fit f16, or the files cannot be written.
    pub fn save_adapter(&mut self) -> Result<()> {
        self.check_earlier()?;
        self.write_adapter(&self.out.clone())
    }

    /// Writes it to another folder, one tensor at a time, for it comes beside all else that the run holds.
    pub(super) fn write_adapter(&mut self, dir: &Path) -> Result<()> {
        crate::format::create_folder(dir)?;
        let kinds: Vec<Kind> = self.file.beside.iter().map(|other| other.method.kind()).collect();
        replace_beside(dir, &kinds, |i, folder| self.write_one(i + 1, folder))?;
        self.write_one(0, dir)
    }

    /// Writes one of its adapters, see [`Trained::owner`], to the folder `dir`.
    fn write_one(&mut self, owner: usize, dir: &Path) -> Result<()> {
        if self.file.method.converts() {
            let mut file = self.snapshot()?;
            file.dir = dir.to_owned();
            return file.save();
        }
        let Self { base, adapters, tensors, file, peak, cycles, facts, .. } = self;
        let (cycles, file) = (cycles.as_ref(), owned_by(file, owner));
        let tensors = || tensors.iter().enumerate().filter(|(_, t)| t.owner == owner);
        let standing_in = standing_in(file, tensors().map(|(_, t)| t));
        for (_, t) in tensors().filter(|(_, t)| standing_in.contains(&t.spec.name)) {
            put_back(file, t, adapters.held().read(&base.backend, t.id)?)?;
        }
        let own = || tensors().filter(|(_, t)| !standing_in.contains(&t.spec.name));
        let shape = |(i, t): (usize, &Trained<B>)| {
            cycles.map_or_else(|| t.spec.shape.clone(), |cycles| cycles.shape(i, t, facts.step))
        };
        let trained = own().map(|(i, t)| (t.spec.name.clone(), shape((i, t))));
        let frozen = file.tensors.iter().map(|(name, t)| (name.clone(), t.shape.clone()));
        let shapes = trained.chain(frozen).collect();
        let summed = cycles.map(|cycles| {
            let mut summed = file.clone();
            summed.method = cycles.method(&file.method, facts.step);
            summed
        });
        summed.as_ref().unwrap_or(&*file).save_by(dir, shapes, |put| {
            for (i, t) in own() {
                let mut values = adapters.held().read(&base.backend, t.id)?;
                if let Some(cycles) = cycles {
                    values = cycles.values_of(&base.backend, adapters, i, values, facts.step)?;
                }
                put(&t.spec.name, &values)?;
            }
            file.tensors.iter().try_for_each(|(name, t)| put(name, &t.data))?;
            peak.sample();
            Ok(())
        })
    }
}

/// The adapter that `tensors` are, with what was put aside by the end of step `step`; `file` is the same without its tensors.
pub(super) fn snapshot<B: Backend>(
    base: &Base<B>,
    adapters: &Adapters<B>,
    tensors: &[Trained<B>],
    file: &AdapterFile,
    (cycles, step): (Option<&Cycles>, u64),
) -> Result<AdapterFile> {
    let (backend, mut file) = (&base.backend, file.clone());
    let (stored, converts) = (file.method.kind().stored(), file.method.converts());
    for owner in 0..=file.beside.len() {
        let own = || tensors.iter().enumerate().filter(|(_, t)| t.owner == owner);
        let file = owned_by(&mut file, owner);
        let stored = file.method.kind().stored();
        let standing_in = standing_in(file, own().map(|(_, t)| t));
        for (i, trained) in own() {
            let Trained { spec, id, .. } = trained;
            if standing_in.contains(&spec.name) {
                put_back(file, trained, adapters.held().read(backend, *id)?)?;
                continue;
            }
            let mut tensor = HostTensor { shape: spec.shape.clone(), data: adapters.held().read(backend, *id)? };
            if let Some(cycles) = cycles {
                tensor.data = cycles.values_of(backend, adapters, i, tensor.data, step)?;
                tensor.shape = cycles.shape(i, trained, step);
            }
            // Rounded is what the file has, and not what it is made of.
            let tensor = if converts { tensor } else { tensor.rounded(stored, &spec.name)? };
            file.tensors.insert(spec.name.clone(), tensor);
        }
    }
    if let Some(cycles) = cycles {
        file.method = cycles.method(&file.method, step);
    }
    if converts {
        file.method.finish(&mut file.tensors, base)?;
        let rounded = std::mem::take(&mut file.tensors).into_iter();
        let rounded = rounded.map(|(name, tensor)| tensor.rounded(stored, &name).map(|tensor| (name, tensor)));
        file.tensors = rounded.collect::<Result<_>>()?;
    }
    Ok(file)
}

/// The adapter number `owner` of a run, see [`Trained::owner`].
fn owned_by(file: &mut AdapterFile, owner: usize) -> &mut AdapterFile {
    match owner {
        0 => file,
        _ => &mut file.beside[owner - 1],
    }
}

/// Names of those of its `tensors` that `file` has in place of parts of the base.
fn standing_in<'t, B: Backend + 't>(
    file: &AdapterFile,
    tensors: impl Iterator<Item = &'t Trained<B>>,
) -> BTreeSet<String> {
    if file.replaced.is_empty() {
        return BTreeSet::new();
    }
    let kind = file.method.kind();
    let adapted: Vec<String> = tensors.filter_map(|t| kind.module_of(&t.spec.name)).map(str::to_owned).collect();
    file.replaced.names_learned(kind, &adapted)
}

/// Puts the values of `trained` in the place that `file` has for them.
///
/// # Errors
/// One is not finite.
fn put_back<B: Backend>(file: &mut AdapterFile, trained: &Trained<B>, values: Vec<f32>) -> Result<()> {
    let (name, shape) = (&trained.spec.name, trained.spec.shape.clone());
    let tensor = HostTensor { shape, data: values }.rounded(Stored::F32, name)?;
    file.replaced.put(file.method.kind(), name, &tensor.data);
    Ok(())
}

/// Takes away what runs that were killed have left half-written in their output folder.
pub(super) fn sweep_folder(out: &Path) {
    checkpoint::FILES.iter().for_each(|name| sweep(&out.join(name)));
    run_folder::sweep(out);
    AdapterFile::sweep(out);
    AdapterFile::sweep(&out.join(FOLDER));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_dense_while_a_run_is_young_and_never_costly() {
        let seconds = Duration::from_secs_f64;
        for (longest, age, cost, expected) in [
            (120.0, 0.0, 0.0, 1.0),
            (120.0, 1.0, 0.01, 1.0),
            (120.0, 1.0, 0.1, 2.0),
            (120.0, 3.0, 0.1, 3.0),
            (120.0, 48.0, 0.1, 48.0),
            (120.0, 1000.0, 0.1, 120.0),
            (1.0, 0.0, 0.0, 1.0),
            (120.0, 3.0, 2.0, 40.0),
            (120.0, 1000.0, 30.0, 600.0),
        ] {
            assert_eq!(
                wait(seconds(longest), seconds(age), seconds(cost)),
                seconds(expected),
                "{longest} {age} {cost}"
            );
        }
        assert!(!Pace::new().due(0));
    }
}
