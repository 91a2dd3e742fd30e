//! The embedded images pass the gate, and the gate catches what it is for.

use fluke_abi::probe::Probe;
use flukevm::image;
use integration::gate::{Violation, scan_code, scan_image, writable_code};
use integration::probes::uses;

fn list(name: &str, violations: &[Violation]) -> String {
    violations
        .iter()
        .map(|violation| format!("{name}: {violation}\n"))
        .collect()
}

#[test]
fn kernels_use_plain_instructions_only() {
    let (kernels, _) = image::embedded();
    assert!(kernels.len() >= 2, "kernels built in: {kernels:?}");
    let mut complaints = String::new();
    for name in kernels {
        let scan = scan_image(image::kernel(name).unwrap()).unwrap();
        assert!(
            scan.instructions > 1000,
            "{name}: only {} instructions",
            scan.instructions
        );
        complaints += &list(name, &scan.violations);
    }
    assert!(complaints.is_empty(), "\n{complaints}");
}

/// An unarmed probe point is a test of one byte: `cmp` and a jump that is not taken.
#[test]
fn probe_points_cost_two_instructions() {
    for name in image::embedded().0 {
        let uses = uses(image::kernel(name).unwrap()).unwrap();
        for &probe in Probe::ALL {
            let points = uses.iter().filter(|point| point.probe == probe).count();
            println!("{name}: {points} points of the kind {}", probe.name());
            assert!(
                points > 0,
                "{name} has no point of the kind {}",
                probe.name()
            );
        }
        let other: Vec<_> = uses.iter().filter(|point| !point.is_test).collect();
        assert!(other.is_empty(), "{name} does more than test: {other:x?}");
    }
}

#[test]
fn no_image_has_writable_code() {
    let (kernels, programs) = image::embedded();
    assert!(programs.len() >= 5, "programs built in: {programs:?}");
    let mut complaints = String::new();
    for name in kernels {
        let violations = writable_code(image::kernel(name).unwrap()).unwrap();
        complaints += &list(name, &violations);
    }
    for name in programs {
        let violations = writable_code(&image::program(name).unwrap()).unwrap();
        complaints += &list(name, &violations);
    }
    assert!(complaints.is_empty(), "\n{complaints}");
}

/// What the gate says of one piece of code.
fn why(code: &[u8]) -> Vec<String> {
    let violations = scan_code(code, 0x1000).violations;
    violations.into_iter().map(|v| v.why).collect()
}

#[test]
fn the_gate_fires() {
    for (name, code, expected) in [
        ("xorps xmm0, xmm0", &b"\x0f\x57\xc0"[..], "register XMM0"),
        (
            "vpxor ymm1, ymm1, ymm1",
            b"\xc5\xf5\xef\xc9",
            "register YMM1",
        ),
        ("movd mm0, eax", b"\x0f\x6e\xc0", "register MM0"),
        ("faddp st(1), st", b"\xde\xc1", "register ST1"),
        ("fld1", b"\xd9\xe8", "x87"),
        ("popcnt eax, ecx", b"\xf3\x0f\xb8\xc1", "popcnt"),
        ("andn eax, ecx, edx", b"\xc4\xe2\x70\xf2\xc2", "BMI1"),
        ("shlx eax, ecx, edx", b"\xc4\xe2\x69\xf7\xc1", "BMI2"),
        ("cmpxchg16b [rdi]", b"\x48\x0f\xc7\x0f", "cmpxchg16b"),
        ("rdtscp", b"\x0f\x01\xf9", "rdtscp"),
        ("xgetbv", b"\x0f\x01\xd0", "XSAVE"),
        ("verw ax", b"\x0f\x00\xe8", "not emulate"),
        ("stac", b"\x0f\x01\xcb", "SMAP"),
        ("clac", b"\x0f\x01\xca", "SMAP"),
        ("int 0x80", b"\xcd\x80", "software interrupt"),
        ("int3; ret", b"\xcc\xc3", "trap"),
        ("test eax, eax; int3", b"\x85\xc0\xcc", "trap"),
        ("jmp to an int3", b"\xeb\x00\xcc", "trap"),
        (
            "mov [rsp-8], rax",
            b"\x48\x89\x44\x24\xf8",
            "below the stack",
        ),
        (
            "mov rax, [rsp+rcx-8]",
            b"\x48\x8b\x44\x0c\xf8",
            "below the stack",
        ),
        ("not an instruction", b"\x06", "no instruction"),
    ] {
        let why = why(code);
        assert!(
            matches!(&why[..], [reason] if reason.contains(expected)),
            "{name}: {why:?}"
        );
    }
}

#[test]
fn the_gate_lets_plain_code_pass() {
    for (name, code) in [
        ("mov [rsp+8], rax", &b"\x48\x89\x44\x24\x08"[..]),
        ("mov rax, [rbp-8]", b"\x48\x8b\x45\xf8"),
        ("lock cmpxchg [rdi], rcx", b"\xf0\x48\x0f\xb1\x0f"),
        ("fxsave64 [rdi]", b"\x48\x0f\xae\x07"),
        ("fxrstor64 [rdi]", b"\x48\x0f\xae\x0f"),
        ("mfence; pause; syscall", b"\x0f\xae\xf0\xf3\x90\x0f\x05"),
        (
            "ret; int3 to the next function",
            b"\xc3\xcc\xcc\xcc\xcc\xcc\xcc\xcc\xcc\xcc\xcc\xcc\xcc\xcc\xcc\xcc\x90",
        ),
        ("ret; int3 to the end", b"\xc3\xcc\xcc"),
    ] {
        assert_eq!(why(code), [""; 0], "{name}");
    }
}

#[test]
fn the_gate_sees_writable_code() {
    let mut image = image::kernel("interrupt").unwrap().to_vec();
    let headers = u64::from_le_bytes(image[32..40].try_into().unwrap()) as usize;
    let count = usize::from(image[56]);
    for header in 0..count {
        let flags = &mut image[headers + header * 56 + 4];
        if *flags & 1 != 0 {
            *flags |= 2;
        }
    }
    let violations = writable_code(&image).unwrap();
    let why: Vec<_> = violations.iter().map(|v| v.why.as_str()).collect();
    assert!(why.iter().any(|w| w.contains("both writable")), "{why:?}");
    assert!(why.iter().any(|w| w.contains("in no segment")), "{why:?}");
}
