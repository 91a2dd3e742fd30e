//! Table 7: what the kernel holds for a thread.

use fluke_abi::bench::News;
use fluke_abi::layout::{KERNEL_STACKS, PAGE_SIZE};
use serde_json::Value;
use std::time::Duration;

use super::applications::workload;
use crate::bench::model::{Measure, Table};
use crate::bench::run::Workload;
use crate::bench::trace::next;
use crate::bench::{Bench, Column, Tabulate};
use crate::error::Error;
use crate::image;
use crate::inspect::types::{Layouts, Types};
use crate::inspect::{self, View};
use crate::paging::translate;
use crate::point::Point;
use crate::vm::Vm;

/// Threads that are put to sleep in each way.
const THREADS: u64 = 64;
/// A program that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// What kernel stacks are filled with, to see how deep they were used.
const PAINT: u8 = 0x5a;

/// The table.
pub struct Memory;

impl Tabulate for Memory {
    fn id(&self) -> &'static str {
        "7"
    }

    fn title(&self) -> &'static str {
        "kernel memory of a thread (OSDI '99 table 7)"
    }

    fn measure(&self, bench: &Bench<'_>, table: &mut Table) -> Result<(), Error> {
        table.baseline = None;
        let columns = bench.configurations();
        let found = bench.at_once(&columns, |column| {
            Ok((held(column)?, deepest(bench, column)?))
        })?;
        for (column, (held, deepest)) in &found {
            let mut add = |row: &str, value: f64| {
                let cell = bench.cell(row, &column.name, Measure::Bytes, vec![value]);
                table.cells.push(cell);
            };
            add("TCB: thread", held.thread as f64);
            add("TCB: scheduler's part", held.entity as f64);
            add("of it, x87 and SSE registers", held.fpu as f64);
            add("stack of its own", held.stack as f64);
            add("in all", (held.thread + held.entity + held.stack) as f64);
            for (name, bytes) in &held.slopes {
                add(&format!("measured, asleep in {name}"), *bytes);
            }
            add("deepest use of a kernel stack", *deepest as f64);
        }
        table.notes.push(format!(
            "TCB: slots of the kernel's arenas, as its debug information has them. Measured: all that the kernel holds (objects, page-table \
             pages, stacks) before and after {THREADS} threads were put to sleep, by thread. Deepest use: kernel stacks were painted before \
             flukeperf ran. All kernels have stacks of the same size, on which a debug build's are not tight."
        ));
        Ok(())
    }
}

/// Type of what a thread has of x87 and SSE registers.
const FPU: &str = "fluke_kernel::arch::fpu::Fpu";

/// What the kernel holds for a thread, bytes.
struct Held {
    thread: u64,
    entity: u64,
    fpu: u64,
    stack: u64,
    /// Measured, by what the threads sleep in.
    slopes: Vec<(String, f64)>,
}

fn held(column: &Column) -> Result<Held, Error> {
    let args = [format!("threads={THREADS}")];
    let workload = Workload::new("flukeperf", &args);
    let fails = |why: &str| Error::Control(format!("{}: {why}", workload.on(column)));
    let kernel = image::kernel(column.configuration.image())?;
    let info = image::check_kernel(&column.name, kernel)?.1;
    let mut vm = Vm::new(workload.machine(column)?)?;
    let mut slopes = Vec::new();
    let mut before = 0;
    let came = vm.run_to(0, Point::FirstUser, PATIENCE);
    if !matches!(came, Ok(true)) {
        return Err(fails("it does not begin"));
    }
    let mut frames = Value::Null;
    loop {
        let mark = next(&mut vm, Point::Told, &fails)?;
        if News::from_number(mark.news) == Some(News::Done) {
            break;
        }
        let seen = vm.inspect(&View::Frames);
        frames = seen.map_err(|error| fails(&error.to_string()))?.json;
        let now =
            in_use(&frames, info.stack_bytes).ok_or_else(|| fails("its pool cannot be read"))?;
        if News::from_number(mark.news) == Some(News::End) {
            let name = mark.name().unwrap_or_default().to_string();
            slopes.push((name, (now - before) as f64 / THREADS as f64));
        }
        before = now;
    }
    let bytes = |kind: &str| {
        let objects = frames["objects"].as_array()?;
        let room = objects.iter().find(|room| room["kind"] == kind)?;
        room["bytes"].as_u64()
    };
    let bytes = |kind: &str| bytes(kind).ok_or_else(|| fails("its pool cannot be read"));
    Ok(Held {
        thread: bytes("thread")?,
        entity: bytes("entity")?,
        fpu: size_of_type(kernel, FPU).map_err(|error| fails(&error.to_string()))?,
        stack: u64::from(info.stack_per_thread != 0) * info.stack_bytes,
        slopes,
    })
}

/// Bytes of a type of the kernel's.
fn size_of_type(kernel: &[u8], path: &str) -> inspect::Result<u64> {
    let types = Types::new(kernel)?;
    Ok(types.get(types.find(path)?)?.size)
}

/// Bytes in use, as the view of the pool has it.
fn in_use(frames: &Value, stack_bytes: u64) -> Option<i64> {
    let mut sum = 0;
    for room in frames["objects"].as_array()? {
        sum += room["live"].as_u64()? * room["bytes"].as_u64()?;
    }
    sum += frames["pages"]["live"].as_u64()? * PAGE_SIZE;
    sum += frames["stacks"]["used"].as_u64()? * stack_bytes;
    i64::try_from(sum).ok()
}

/// The deepest use of a kernel stack, bytes.
fn deepest(bench: &Bench<'_>, column: &Column) -> Result<u64, Error> {
    let mut workload = workload(bench, "flukeperf", false);
    workload.args = vec!["batches=1".into()];
    let fails = |why: &str| Error::Control(format!("{}: {why}", workload.on(column)));
    let kernel = image::kernel(column.configuration.image())?;
    let stack = image::check_kernel(&column.name, kernel)?.1.stack_bytes;
    let mut vm = Vm::new(workload.machine(column)?)?;
    let root = vm.registers(0).map(|registers| registers.special.cr3);
    let root = root.ok_or_else(|| fails("it does not begin"))?;
    // Pages of the stacks, by slot, from the bottom up.
    let mut slots: Vec<Vec<u64>> = Vec::new();
    loop {
        let bottom = KERNEL_STACKS + (2 * slots.len() as u64 + 1) * stack;
        let pages = (bottom..bottom + stack).step_by(PAGE_SIZE as usize);
        let pages: Vec<_> = pages
            .filter_map(|page| translate(vm.memory(), root, page))
            .map(|translation| translation.pa)
            .collect();
        if pages.is_empty() {
            break;
        }
        slots.push(pages);
    }
    let paint = [PAINT; PAGE_SIZE as usize];
    for page in slots.iter().flatten() {
        vm.memory().write(*page, &paint)?;
    }
    vm.resume();
    if vm.wait(PATIENCE).is_none() {
        return Err(fails("it hangs"));
    }
    let mut deepest = 0;
    for pages in &slots {
        let mut clean = 0;
        for page in pages {
            let mut bytes = paint;
            vm.memory().read(*page, &mut bytes)?;
            let same = bytes.iter().take_while(|byte| **byte == PAINT).count() as u64;
            clean += same;
            if same < PAGE_SIZE {
                break;
            }
        }
        deepest = deepest.max(stack.saturating_sub(clean));
    }
    Ok(deepest)
}
