//! Images that are not what they should be.

use super::*;

/// A minimal program: one segment with its header, at `PROGRAM_BASE`.
fn program() -> Vec<u8> {
    let base = layout::PROGRAM_BASE;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2u16, 62].map(u16::to_le_bytes).concat()); // ET_EXEC, x86-64
    elf.extend(1u32.to_le_bytes());
    elf.extend([base + 0x100, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    elf.extend([1u32, 5].map(u32::to_le_bytes).concat()); // PT_LOAD, R+X
    elf.extend(
        [0, base, base, 0x200, 0x300, 0x1000]
            .map(u64::to_le_bytes)
            .concat(),
    );
    elf.resize(0x200, 0x90);
    elf
}

fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut elf = program();
    elf[at..at + bytes.len()].copy_from_slice(bytes);
    elf
}

fn why(data: &[u8]) -> String {
    let text = check_program("foo", data).unwrap_err().to_string();
    assert!(text.starts_with("`foo`: "), "{text}");
    assert!(
        text.ends_with("build it against libfluke (see tools/programs)"),
        "{text}"
    );
    text
}

#[test]
fn a_good_program_passes() {
    let elf = check_program("foo", &program()).unwrap();
    assert_eq!(elf.entry, layout::PROGRAM_BASE + 0x100);
    let [segment] = &elf.segments[..] else {
        panic!("{elf:?}");
    };
    assert_eq!(segment.pages(), (layout::PROGRAM_BASE, 0x1000));
    assert_eq!(segment.file, 0..0x200);
    assert_eq!(segment.prot, Prot::READ | Prot::EXECUTE);
}

#[test]
fn each_kind_of_foreign_file_is_named() {
    assert!(why(b"").contains("not an ELF file"));
    assert!(why(b"#!/bin/sh\n").contains("not an ELF file"));
    assert!(why(b"\x7fELF").contains("cut short"));
    assert!(why(&with(4, &[1])).contains("32-bit"));
    assert!(why(&with(5, &[2])).contains("big-endian"));
    assert!(why(&with(18, &[183])).contains("another machine (number 183)"));
    assert!(why(&with(16, &[3])).contains("fixed addresses"));
    assert!(
        why(&with(64, &[3])).contains("dynamically linked"),
        "PT_INTERP"
    );
    assert!(why(&with(64, &[4])).contains("0 segments"), "PT_NOTE");
    assert!(why(&with(68, &[7])).contains("both writable and executable"));
    assert!(why(&with(24, &[0; 8])).contains("entry point 0x0"));
}

#[test]
fn addresses_outside_the_program_area_are_refused() {
    for va in [
        0,
        0x1000,
        layout::ENTRY_MIN,
        layout::ROOT_MEMORY,
        layout::KERNEL_IMAGE,
        !0,
    ] {
        assert!(
            why(&with(80, &va.to_le_bytes())).contains("outside"),
            "{va:#x}"
        );
    }
    assert!(
        why(&with(104, &u64::MAX.to_le_bytes())).contains("outside"),
        "p_memsz"
    );
}

#[test]
fn every_truncation_is_an_error_and_no_panic() {
    let elf = program();
    for length in 0..elf.len() {
        why(&elf[..length]);
    }
}

#[test]
fn sizes_in_the_file_that_lie_are_errors() {
    assert!(
        why(&with(72, &u64::MAX.to_le_bytes())).contains("cut short"),
        "p_offset"
    );
    assert!(
        why(&with(96, &0x301u64.to_le_bytes())).contains("cut short"),
        "p_filesz"
    );
    assert!(
        why(&with(32, &u64::MAX.to_le_bytes())).contains("cut short"),
        "e_phoff"
    );
}

#[test]
fn a_program_is_no_kernel() {
    assert!(check_kernel("foo", &program()).is_err());
    let own = fs::read(std::env::current_exe().unwrap()).unwrap();
    assert!(check_kernel("foo", &own).is_err());
    assert!(why(&own).contains("dynamically linked"));
}

#[test]
fn missing_programs_and_files_say_what_there_is() {
    let text = program_error("no-such-program");
    assert!(
        text.contains("no program of that name is built in"),
        "{text}"
    );
    assert!(program_error("./no/such/file").contains("cannot read"));
    assert!(program_error("/").contains("cannot read"));
}

fn program_error(name: &str) -> String {
    super::program(name).unwrap_err().to_string()
}
