//! Refusals: parts that contradict a shape, memory that is not there, instruction sets that are not here.

use super::harness::Random;
use super::weights::{self, KINDS};
use bytes::Bytes;
use pocketlora_kernels::cpu::{Cpu, Table};
use pocketlora_kernels::{
    Absmax, Backend, Call, Error, FloatType, MatrixData, MatrixSource, Memory, Nf4Source, WorkType,
};
use std::sync::Arc;

#[test]
fn a_weight_whose_parts_do_not_fit_is_refused() {
    refuses_weights(&Cpu::new(1));
    #[cfg(feature = "vulkan")]
    super::harness::new_vulkan().iter().for_each(refuses_weights);
}

fn refuses_weights<B: Backend>(device: &B) {
    let (good, _) = weights::random(&mut Random(31), KINDS[3], 5, 70);
    let MatrixData::Nf4(nf4) = good.data.clone() else { panic!() };
    let with = |nf4: Nf4Source| MatrixSource { rows: 5, cols: 70, data: MatrixData::Nf4(nf4) };
    type Edit = fn(&mut Bytes, &mut Arc<[f32]>, &mut usize);
    let double = |f: Edit| {
        let mut nf4 = nf4.clone();
        let Absmax::Double { codes, nested, nested_block, .. } = &mut nf4.absmax else { panic!() };
        f(codes, nested, nested_block);
        with(nf4)
    };
    assert!(device.matrix(with(nf4.clone())).is_ok());
    let cases = [
        with(Nf4Source { packed: nf4.packed.slice(1..), ..nf4.clone() }),
        with(Nf4Source { block: 0, ..nf4.clone() }),
        with(Nf4Source { block: 48, ..nf4.clone() }),
        with(Nf4Source { block: 8192, ..nf4.clone() }),
        with(Nf4Source { absmax: Absmax::Plain(Bytes::from_static(&[0; 7])), ..nf4.clone() }),
        double(|codes, _, _| *codes = codes.slice(1..)),
        double(|_, nested, _| *nested = [].into()),
        double(|_, _, nested_block| *nested_block = 0),
        double(|_, _, nested_block| *nested_block = 1),
        MatrixSource { rows: usize::MAX, cols: 3, ..good.clone() },
        MatrixSource { rows: usize::MAX, cols: 3, data: MatrixData::Dense(FloatType::F16, Bytes::new()) },
        MatrixSource { rows: 2, cols: 3, data: MatrixData::Dense(FloatType::F16, Bytes::from_static(&[0; 13])) },
    ];
    for (i, source) in cases.into_iter().enumerate() {
        let result = device.matrix(source);
        assert!(matches!(result, Err(Error::Matrix { .. })), "case {i} was accepted");
    }
}

#[test]
fn refused_memory_is_an_error() {
    refuses_memory(&Cpu::new(1));
    #[cfg(feature = "vulkan")]
    super::harness::new_vulkan().iter().for_each(refuses_memory);
}

fn refuses_memory<B: Backend>(device: &B) {
    assert!(matches!(device.buffer(usize::MAX / 2), Err(Error::OutOfMemory { .. })));
    assert!(matches!(device.work_matrix(usize::MAX, 3, WorkType::F16), Err(Error::OutOfMemory { .. })));
}

#[test]
fn an_instruction_set_that_is_not_here_is_an_error() {
    let message = Table::by_name("mmx").err().unwrap().to_string();
    assert!(message.contains("`mmx`") && message.contains("`portable`"), "{message}");
    for table in Table::available() {
        assert_eq!(Table::by_name(table.isa().name()).unwrap().isa(), table.isa());
    }
}

#[test]
#[should_panic(expected = "token id beyond")]
fn a_token_id_beyond_the_embedding_is_a_bug() {
    let cpu = Cpu::new(1);
    let (source, _) = weights::random(&mut Random(32), KINDS[0], 4, 8);
    cpu.run(Call::Embed { table: &cpu.matrix(source).unwrap(), ids: &[4], y: &mut cpu.buffer(8).unwrap() }).unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "measures time")]
fn the_number_of_threads_is_chosen_among_those_there_are() {
    let (source, _) = weights::random(&mut Random(33), KINDS[4], 64, 256);
    for threads in [1, 3] {
        let cpu = Cpu::new(threads);
        let weight = cpu.matrix(source.clone()).unwrap();
        for least in 0..5 {
            cpu.choose_threads(&[&weight], least);
            let range = least.clamp(1, threads)..=threads;
            assert!(range.contains(&cpu.threads()), "{} of {range:?}", cpu.threads());
        }
        cpu.choose_threads(&[], 1);
        assert!((1..=threads).contains(&cpu.threads()));
    }
}
