//! The memory of a machine as the kernel will find it, without KVM.

use super::*;
use crate::image::embedded;
use crate::paging::{Translation, translate};

const CPUS: u32 = 3;

fn machine(gate: Gate) -> MachineInfo {
    MachineInfo {
        cpus: CPUS,
        gate,
        tsc_khz: 2_000_000,
        apic_timer_khz: 1_000_000,
        preemption_points: false,
        clock: 0,
        store: false,
    }
}

/// Lays out each embedded kernel; none is embedded with `FLUKEVM_GUESTS=skip`.
fn for_each_kernel(test: impl Fn(&Memory, &Entrance, &BootInfo, &Elf, &ImageInfo)) {
    for name in embedded().0 {
        let kernel = image::kernel(name).unwrap();
        let root = image::program("root").unwrap();
        let program = GuestFile {
            name: "prog".into(),
            data: root.clone(),
        };
        let files = [GuestFile {
            name: "data".into(),
            data: vec![7; 5000],
        }];
        let guest = FlukeGuest {
            kernel,
            root: &root,
            program: &program,
            args: &["one".into(), "".into()],
            files: &files,
            mutant: Mutant::none,
        };
        let memory = Memory::new(64 * MIB).unwrap();
        let at = fluke(&memory, &machine(Gate::Ud2), &guest).unwrap();
        let info = memory.get::<BootInfo>(at.rsi - DIRECT_MAP).unwrap();
        let (elf, image) = image::check_kernel(name, kernel).unwrap();
        test(&memory, &at, &info, &elf, &image);
    }
}

#[test]
fn no_frame_has_two_owners() {
    for_each_kernel(|memory, _, info, _, _| {
        let mut extents: Vec<(u64, u64)> = info.segments[..info.segment_count as usize]
            .iter()
            .map(|s| (s.start, s.size))
            .chain([
                (info.pool.start, info.pool.size),
                (info.stats.start, info.stats.size),
            ])
            .chain(
                [info.gate_page, info.page_table, info.own_page_table]
                    .map(|page| (page, PAGE_SIZE)),
            )
            .collect();
        extents.sort_unstable();
        for pair in extents.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{extents:x?}");
        }
        for (start, size) in extents {
            assert!(start % PAGE_SIZE == 0 && size % PAGE_SIZE == 0 && size > 0);
            assert!(start > 0 && start + size <= memory.size());
        }
    });
}

#[test]
fn the_kernel_has_no_page_that_is_writable_and_executable_or_an_alias_that_is() {
    for_each_kernel(|memory, _, info, _, _| {
        let walk = |va| translate(memory, info.page_table, va);
        let mut kernel = 0;
        for pa in (0..memory.size()).step_by(PAGE_SIZE as usize) {
            let direct = walk(DIRECT_MAP + pa);
            let image = walk(KERNEL_IMAGE + pa);
            if let Some(Translation { pa: to, flags, .. }) = direct {
                assert_eq!(to, pa);
                assert!(flags.contains(Entry::NO_EXECUTE));
                assert!(!flags.contains(Entry::USER));
            }
            let Some(Translation { pa: to, flags, .. }) = image else {
                continue;
            };
            kernel += 1;
            assert_eq!(to, pa);
            assert!(!flags.contains(Entry::USER | Entry::GLOBAL));
            assert!(flags.contains(Entry::NO_EXECUTE) || !flags.contains(Entry::WRITE));
            // Text has no alias at all.
            assert!(direct.is_none() || direct == image, "{pa:#x}");
            assert!(direct.is_none() || flags.contains(Entry::NO_EXECUTE));
        }
        assert!(kernel > 0);
    });
}

#[test]
fn user_mode_in_the_kernels_own_space_has_the_image_but_what_a_trap_needs() {
    for_each_kernel(|memory, at, info, elf, _| {
        let common = |va| translate(memory, info.page_table, va);
        let own = |va| translate(memory, info.own_page_table, va);
        let mut kinds = [0; 2];
        for segment in &elf.segments {
            let (start, size) = segment.pages();
            for va in (start..start + size).step_by(PAGE_SIZE as usize) {
                let (common, own) = (common(va).unwrap(), own(va).unwrap());
                let user = own.flags.contains(Entry::USER);
                assert_eq!(user, !segment.supervisor, "{va:#x}");
                assert_eq!(own.flags.difference(Entry::USER), common.flags);
                assert_eq!(own.pa, common.pa);
                kinds[usize::from(user)] += 1;
            }
        }
        assert!(kinds.iter().all(|&pages| pages > 1), "{kinds:?}");
        for va in [DIRECT_MAP, at.stack - PAGE_SIZE, at.rsi] {
            assert!(common(va).is_some_and(|page| !page.flags.contains(Entry::USER)));
            assert_eq!(own(va), common(va));
        }
        let gate = own(GATE).unwrap();
        assert!(gate.pa == info.gate_page && gate.flags.contains(Entry::USER));
        assert!(!gate.flags.contains(Entry::WRITE));
    });
}

#[test]
fn stacks_have_guards_and_memory_of_their_own() {
    for_each_kernel(|memory, at, info, _, image| {
        let mut frames = std::collections::HashSet::new();
        assert!(info.stacks >= CPUS);
        assert_eq!(info.stacks > CPUS, image.stack_per_thread != 0);
        for slot in 0..u64::from(info.stacks) {
            let low = KERNEL_STACKS + slot * 2 * image.stack_bytes;
            let walk = |va| translate(memory, info.page_table, va);
            assert_eq!(walk(low), None);
            assert_eq!(walk(low + image.stack_bytes - 1), None);
            for page in (image.stack_bytes..2 * image.stack_bytes).step_by(PAGE_SIZE as usize) {
                let page = walk(low + page).unwrap();
                assert!(page.flags.contains(Entry::WRITE | Entry::NO_EXECUTE));
                assert!(frames.insert(page.pa));
            }
        }
        assert_eq!(at.stack, KERNEL_STACKS + 2 * image.stack_bytes);
        assert_eq!(at.stack_step, 2 * image.stack_bytes);
    });
}

#[test]
fn the_root_program_finds_its_arguments_and_modules() {
    for_each_kernel(|memory, _, info, _, _| {
        let segments = &info.segments[..info.segment_count as usize];
        let physical = |va: u64| {
            let s = segments
                .iter()
                .find(|s| (s.va..s.va + s.size).contains(&va))
                .unwrap();
            (s.start + (va - s.va), s.prot)
        };
        let (at, prot) = physical(ROOT_INFO);
        assert_eq!(prot, Prot::READ.bits());
        let root = memory.get::<RootInfo>(at).unwrap();
        assert_eq!(&root.args[..root.args_size as usize], b"prog\0one\0\0");
        assert_eq!((root.module_count, root.cpus), (2, CPUS));
        let data = root.modules[1];
        assert_eq!((&data.name[..5], data.size), (&b"data\0"[..], 5000));
        assert_eq!(data.kind, ModuleKind::File as u64);
        let mut bytes = [0; 5001];
        memory.read(physical(data.va).0, &mut bytes).unwrap();
        assert!(bytes[..5000].iter().all(|b| *b == 7) && bytes[5000] == 0);
        let (_, prot) = physical(ROOT_MEMORY + root.memory_size - 1);
        assert_eq!(prot, (Prot::READ | Prot::WRITE).bits());
        let mut gate = [0; 4];
        memory.read(info.gate_page, &mut gate).unwrap();
        assert_eq!(gate, [0x0f, 0x0b, 0xc3, 0xcc]);
    });
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    assert_eq!(arguments("a", &["b c".into()]).unwrap(), b"a\0b c\0");
    let long = "x".repeat(ARGS_BYTES);
    assert!(
        arguments("a", &[long])
            .unwrap_err()
            .to_string()
            .contains("shorten")
    );
}
