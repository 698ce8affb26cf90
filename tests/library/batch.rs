//! A batch of sequences with adapters of their own gives what each gives by itself.

use crate::common::{golden, max_diff, open_exact};
use pocketlora::adapter::AdapterFile;
use pocketlora::internals::Adapters;
use pocketlora::internals::{Logits, Sequence, Step, Workspace};
use pocketlora::{Engine, internals};
use pocketlora_kernels::{Cpu, WorkType};

/// What each of four sequences gets in three rounds: prompts, and single tokens beside them.
const ROUNDS: [[usize; 4]; 3] = [[9, 5, 12, 3], [1, 7, 1, 2], [1, 1, 1, 1]];

/// Adapters of the four sequences; one has none.
const ADAPTERS: [Option<&str>; 4] = [Some("lora"), Some("rslora"), None, Some("lora_patterns")];

fn adapters(engine: &Engine) -> Vec<Adapters<Cpu>> {
    let base = internals::base(engine);
    let one = |name: &Option<&str>| {
        let mut adapters = Adapters::none(base);
        if let Some(name) = name {
            let file = AdapterFile::open(&golden("adapters").join(name)).unwrap();
            adapters.attach(base, &file, 1.0, WorkType::F32).unwrap();
        }
        adapters
    };
    ADAPTERS.iter().map(one).collect()
}

/// Tokens of sequence `i`: other ones in each.
fn text(i: usize) -> Vec<u32> {
    (0..ROUNDS.iter().map(|round| round[i]).sum()).map(|t| ((t * 37 + i * 101 + 5) % 500) as u32).collect()
}

/// All logits of all sequences, run in `batches` of them at a time.
fn run(engine: &Engine, all: &[Adapters<Cpu>], batches: &[&[usize]]) -> Vec<Vec<f32>> {
    let base = internals::base(engine);
    let mut work = Workspace::new(internals::numbers(engine).arithmetic);
    let new = || Sequence::new(base, internals::numbers(engine).cache).unwrap();
    let mut sequences: Vec<Option<Sequence<Cpu>>> = all.iter().map(|_| Some(new())).collect();
    let mut found = vec![Vec::new(); all.len()];
    for round in ROUNDS {
        for batch in batches {
            let mut taken: Vec<Sequence<Cpu>> = batch.iter().map(|&i| sequences[i].take().unwrap()).collect();
            let texts: Vec<Vec<u32>> = batch.iter().map(|&i| text(i)).collect();
            let mut steps = Vec::new();
            for ((&i, sequence), text) in batch.iter().zip(&mut taken).zip(&texts) {
                let ids = &text[sequence.len()..sequence.len() + round[i]];
                steps.push(Step { sequence, ids, adapters: &all[i], logits: 0..round[i] });
            }
            let vocab = base.model.config().vocab_size;
            let mut take = |logits: &Logits| {
                for ((step, _), row) in logits.places.iter().zip(logits.values.chunks_exact(vocab)) {
                    found[batch[*step]].extend_from_slice(row);
                }
                Ok(())
            };
            base.forward(&mut work, &mut steps, &mut || true, &mut take).unwrap();
            for (&i, sequence) in batch.iter().zip(taken) {
                sequences[i] = Some(sequence);
            }
        }
    }
    found
}

#[test]
fn four_sequences_with_three_adapters_give_what_each_gives_apart() {
    for threads in [1, 2] {
        let engine = open_exact(&golden("tiny-llama"), threads);
        let all = adapters(&engine);
        let together = run(&engine, &all, &[&[0, 1, 2, 3]]);
        let apart = run(&engine, &all, &[&[0], &[1], &[2], &[3]]);
        for (i, (together, apart)) in together.iter().zip(&apart).enumerate() {
            let (diff, at) = max_diff(together, apart);
            assert!(diff <= 1e-4, "sequence {i}, logit {at}: off by {diff}");
        }
        // Each adapter does something, and to its own rows.
        let plain: Vec<_> = ADAPTERS.iter().map(|_| Adapters::none(internals::base(&engine))).collect();
        for (i, (with, without)) in together.iter().zip(run(&engine, &plain, &[&[0, 1, 2, 3]])).enumerate() {
            assert_eq!(max_diff(with, &without).0 > 0.1, ADAPTERS[i].is_some(), "sequence {i}");
        }
    }
}

#[test]
fn a_batch_that_is_stopped_leaves_its_sequences_as_they_were() {
    let engine = open_exact(&golden("tiny-llama"), 1);
    let (base, none) = (internals::base(&engine), Adapters::none(internals::base(&engine)));
    let mut work = Workspace::new(internals::numbers(&engine).arithmetic);
    let mut sequence = Sequence::new(base, internals::numbers(&engine).cache).unwrap();
    let mut forward = |sequence: &mut Sequence<Cpu>, ids: &[u32], layers: usize| {
        let (mut left, mut found) = (layers, Vec::new());
        let step = Step { sequence, ids, adapters: &none, logits: ids.len() - 1..ids.len() };
        let mut keep_going = || {
            left = left.saturating_sub(1);
            left > 0
        };
        let mut take = |logits: &Logits| {
            found.clone_from(&logits.values);
            Ok(())
        };
        base.forward(&mut work, &mut [step], &mut keep_going, &mut take).map(|()| found)
    };
    forward(&mut sequence, &text(0)[..6], usize::MAX).unwrap();
    // After the first of two layers.
    let e = forward(&mut sequence, &[7, 8, 9], 2).unwrap_err();
    assert_eq!((e.code(), sequence.len()), (pocketlora::ErrorCode::Cancelled, 6));
    let after = forward(&mut sequence, &text(0)[6..9], usize::MAX).unwrap();
    let mut whole = Sequence::new(base, internals::numbers(&engine).cache).unwrap();
    let expected = forward(&mut whole, &text(0)[..9], usize::MAX).unwrap();
    assert!(max_diff(&after, &expected).0 <= 1e-4);
}
