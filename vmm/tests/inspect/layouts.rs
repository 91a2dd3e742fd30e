//! The debug information of the images against what is known otherwise.

use std::mem::offset_of;

use fluke_abi::boot::{BootInfo, Extent, Segment};
use fluke_abi::ipc::ExceptionMessage;
use fluke_abi::layout::DIRECT_MAP;
use fluke_abi::state::{Handlers, SavedState};
use fluke_abi::stats::CpuStats;
use flukevm::image;
use flukevm::inspect::types::{Kind, Layouts, Types, short};
use flukevm::inspect::value::{Guest, Value};
use flukevm::inspect::{Machine, View, look};
use flukevm::memory::Memory;

use super::images;

macro_rules! same_layout {
    ($types:expr, $path:literal, $ty:ty, [$($field:ident),*]) => {{
        let ty = $types.get($types.find($path).unwrap()).unwrap();
        assert_eq!(ty.size, size_of::<$ty>() as u64, $path);
        let Kind::Struct(members) = &ty.kind else {
            panic!("{} is no structure", $path);
        };
        let offset = |name: &str| members.iter().find(|m| m.name == name).map(|m| m.offset);
        $( assert_eq!(offset(stringify!($field)), Some(offset_of!($ty, $field) as u64),
            "{} {}", $path, stringify!($field)); )*
    }};
}

#[test]
fn structures_that_host_and_kernel_share_have_the_same_layout() {
    for name in images() {
        let types = Types::new(image::kernel(name).unwrap()).unwrap();
        same_layout!(
            types,
            "fluke_abi::boot::BootInfo",
            BootInfo,
            [
                magic,
                cpus,
                gate,
                tsc_khz,
                memory_size,
                pool,
                stats,
                gate_page,
                segments
            ]
        );
        same_layout!(types, "fluke_abi::boot::Extent", Extent, [start, size]);
        same_layout!(
            types,
            "fluke_abi::boot::Segment",
            Segment,
            [va, start, size, prot]
        );
        same_layout!(
            types,
            "fluke_abi::state::Handlers",
            Handlers,
            [trap, interrupt, client_alert, server_alert]
        );
        same_layout!(
            types,
            "fluke_abi::state::SavedState",
            SavedState,
            [rax, rcx, rdx, rip, rflags]
        );
        same_layout!(
            types,
            "fluke_abi::ipc::ExceptionMessage",
            ExceptionMessage,
            [
                magic,
                code,
                subcode,
                access,
                region_offset,
                region_hash,
                thread_hash,
                rip
            ]
        );
        same_layout!(
            types,
            "fluke_abi::stats::CpuStats",
            CpuStats,
            [calls, restarts, soft_faults, preemptions]
        );
    }
}

/// Where tests put values.
const PAGE: u64 = 0x40000;

#[test]
fn every_variant_is_told_by_its_own_value() {
    for name in images() {
        let types = Types::new(image::kernel(name).unwrap()).unwrap();
        let memory = Memory::new(1 << 20).unwrap();
        let guest = Guest {
            types: &types,
            memory: &memory,
        };
        let id = types.find("fluke_kernel::thread::Wait").unwrap();
        let ty = types.get(id).unwrap();
        let Kind::Variants { variants, .. } = &ty.kind else {
            panic!("`Wait` has no variants");
        };
        assert!(variants.len() > 10);
        for variant in variants {
            memory.put(PAGE, &(variant.value.unwrap() as u8)).unwrap();
            let value = Value::new(&guest, id, DIRECT_MAP + PAGE);
            assert_eq!(value.variant().unwrap().0, variant.member.name);
        }
        memory.put(PAGE, &0xffu8).unwrap();
        let none = Value::new(&guest, id, DIRECT_MAP + PAGE)
            .variant()
            .err()
            .unwrap();
        assert!(
            none.to_string()
                .contains("0xff at 0xffff800000040000 is no `Wait`"),
            "{none}"
        );
        // Its values are spare in `Run`, whose own variants take others.
        let run = Value::new(
            &guest,
            types.find("fluke_kernel::thread::Run").unwrap(),
            DIRECT_MAP + PAGE,
        );
        memory
            .put(PAGE, &(variants[0].value.unwrap() as u8))
            .unwrap();
        let (name, waiting) = run.variant().unwrap();
        assert_eq!(name, "Waiting");
        let inner = waiting.field("__0").unwrap().variant().unwrap();
        assert_eq!(inner.0, variants[0].member.name);
        assert!(run.to_string().starts_with("Waiting(Mutex(#0.0"), "{run}");
    }
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    for name in images() {
        let types = Types::new(image::kernel(name).unwrap()).unwrap();
        let memory = Memory::new(1 << 20).unwrap();
        let guest = Guest {
            types: &types,
            memory: &memory,
        };
        let locked = guest.find_static("fluke_kernel::lock::LOCKED").unwrap();
        let error = locked.field("taken").unwrap().bool().unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("broken kernel state: nothing at 0xffffffff")
        );
    }
}

/// An image with every occurrence of some bytes replaced.
fn with(image: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut changed = image.to_vec();
    let mut found = 0;
    for at in 0..changed.len() - from.len() {
        if changed[at..].starts_with(from) {
            changed[at..at + to.len()].copy_from_slice(to);
            found += 1;
        }
    }
    assert!(found > 0, "{from:x?} is not in the image");
    changed
}

#[track_caller]
fn refused(image: &[u8], why: &str) {
    let error = Types::new(image).and_then(|types| types.find_static("fluke_kernel::lock::LOCKED"));
    let error = error.err().unwrap().to_string();
    assert!(error.contains(why), "{error}");
}

#[test]
fn images_that_cannot_be_read_are_refused_with_the_reason() {
    refused(b"no ELF", "the kernel image is no ELF file");
    for name in images() {
        let image = image::kernel(name).unwrap();
        let stripped = with(image, b"\0.debug_info\0", b"\0.rebug_info\0");
        refused(&stripped, "the kernel image carries no debug information");
        let renamed = with(image, b"\0LOCKED\0", b"\0UNLOCK\0");
        refused(
            &renamed,
            "has no static `fluke_kernel::lock::LOCKED`; flukevm reads any layout",
        );
        let (start, end) = debug_info(image);
        let mut cut = image.to_vec();
        cut[start + 100..end].fill(0xff);
        assert!(Types::new(&cut).is_err());
    }
}

#[test]
fn a_kernel_without_a_field_that_is_looked_for_is_refused_and_not_misread() {
    for kernel in super::configurations() {
        let mut vm = super::paused(kernel, 1, "spin", std::time::Duration::from_millis(500));
        let vcpus = vec![vm.registers(0)];
        let name = super::image_of(kernel);
        let image = with(
            image::kernel(name).unwrap(),
            b"\0stop_requested\0",
            b"\0stap_requested\0",
        );
        let machine = Machine {
            memory: vm.memory(),
            vcpus: vcpus.clone(),
            image: &image,
        };
        // Nobody looks for that one; it is shown by the name that it has.
        let thread = look(&machine, &View::Thread { id: 0 }).unwrap();
        assert!(
            thread.text.contains("stap_requested: false"),
            "{}",
            thread.text
        );
        let image = with(&image, b"\0idempotent_client\0", b"\0idempotent_server\0");
        let machine = Machine {
            memory: vm.memory(),
            vcpus,
            image: &image,
        };
        let error = look(&machine, &View::Threads).unwrap_err().to_string();
        assert!(
            error.contains("has no `Thread.idempotent_client`"),
            "{error}"
        );
        assert!(look(&machine, &View::Ports).is_ok());
    }
}

fn debug_info(image: &[u8]) -> (usize, usize) {
    use object::{Object, ObjectSection};
    let file = object::File::parse(image).unwrap();
    let section = file.section_by_name(".debug_info").unwrap();
    let (start, size) = section.file_range().unwrap();
    (start as usize, (start + size) as usize)
}

#[test]
fn names_are_shown_without_paths() {
    for (full, name) in [
        ("u64", "u64"),
        ("a::b::C", "C"),
        ("Id<fluke_kernel::thread::Thread>", "Id<Thread>"),
        ("Option<a::Id<a::b::C>>", "Option<Id<C>>"),
        ("&mut [fluke_kernel::sched::CpuState]", "&mut [CpuState]"),
        ("(a::B, c::D)", "(B, D)"),
    ] {
        assert_eq!(short(full), name);
    }
}
