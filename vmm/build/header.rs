//! Generates `fluke.h`, the C face of `fluke-abi`.
//!
//! Stubs come from the entry table. Structures are spelled once here, and their sizes and offsets
//! are taken from the Rust ones and asserted in the header, so that a C program that compiles
//! agrees with the kernel.

use std::fmt::Write;
use std::mem::{offset_of, size_of};

use fluke_abi::code::{Exception, Insanity, Status};
use fluke_abi::entry::{Convention, Row, TABLE};
use fluke_abi::state::{Prot, ThreadFlags};
use fluke_abi::{ABI_VERSION, boot, ipc, layout, object, port, state};

/// Registers of a `regs` call, in order of the parameters.
const REGISTERS: [&str; 8] = ["rdi", "rsi", "rdx", "r10", "r8", "r9", "r12", "r13"];

macro_rules! c_struct {
    ($out:expr, $ty:ty, $name:literal, [$($field:ident: $c:literal),* $(,)?]) => {{
        let _ = writeln!($out, "\nstruct {} {{", $name);
        $( let _ = writeln!($out, "    {};", $c.replace("$", stringify!($field))); )*
        let _ = writeln!($out, "}};\n_Static_assert(sizeof(struct {}) == {}, \"{} size\");",
            $name, size_of::<$ty>(), $name);
        $( let _ = writeln!($out, "_Static_assert(offsetof(struct {}, {}) == {}, \"{} {}\");",
            $name, stringify!($field), offset_of!($ty, $field), $name, stringify!($field)); )*
    }};
}

/// The text of `fluke.h`.
pub fn generate() -> String {
    let mut h = String::from(
        "/* The Fluke kernel's interface for C. Generated from the crate fluke-abi: do not edit. */\n\
         #ifndef FLUKE_H\n#define FLUKE_H\n\n#include <stddef.h>\n#include <stdint.h>\n\n",
    );
    constants(&mut h);
    objects(&mut h);
    structures(&mut h);
    for row in TABLE {
        match row.convention {
            Convention::Registers => registers_stub(&mut h, row),
            Convention::Message => message_stub(&mut h, row),
        }
    }
    h.push_str("\n#endif\n");
    h
}

fn define(h: &mut String, name: &str, value: u64) {
    let _ = writeln!(h, "#define {name} {value:#x}ul");
}

fn constants(h: &mut String) {
    for (name, value) in [
        ("FLUKE_ABI_VERSION", u64::from(ABI_VERSION)),
        ("FLUKE_PAGE_SIZE", layout::PAGE_SIZE),
        ("FLUKE_VM_MIN", layout::VM_MIN),
        ("FLUKE_VM_MAX", layout::VM_MAX),
        ("FLUKE_ENTRY_MIN", layout::ENTRY_MIN),
        ("FLUKE_ENTRY_MAX", layout::ENTRY_MAX),
        ("FLUKE_GATE", layout::GATE),
        ("FLUKE_GATE_DONE", layout::GATE_DONE),
        ("FLUKE_PROGRAM_BASE", layout::PROGRAM_BASE),
        ("FLUKE_ROOT_INFO", layout::ROOT_INFO),
        ("FLUKE_ROOT_OBJECTS", layout::ROOT_OBJECTS),
        ("FLUKE_ROOT_MEMORY", layout::ROOT_MEMORY),
        ("FLUKE_ROOT_MODULES", layout::ROOT_MODULES),
        ("FLUKE_OBJECT_SIZE", object::OBJECT_SIZE),
        ("FLUKE_BOOT_MAGIC", boot::BOOT_MAGIC),
        ("FLUKE_IPC_WORD_SIZE", ipc::WORD_SIZE),
        ("FLUKE_EXCEPTION_MAGIC", ipc::EXCEPTION_MAGIC),
        ("FLUKE_PRIORITY_MAX", state::PRIORITY_MAX),
        ("FLUKE_PRIORITY_DEFAULT", state::PRIORITY_DEFAULT),
        ("FLUKE_PORT_CONSOLE", u64::from(port::CONSOLE)),
    ] {
        define(h, name, value);
    }
    h.push('\n');
    for (name, flag) in Prot::all().iter_names() {
        define(h, &format!("FLUKE_PROT_{name}"), flag.bits());
    }
    for (name, flag) in ThreadFlags::all().iter_names() {
        define(h, &format!("FLUKE_THREAD_{name}"), flag.bits());
    }
    h.push('\n');
    for code in Status::ALL {
        define(
            h,
            &format!("FLUKE_{}", screaming(code.name())),
            *code as u64,
        );
    }
    for code in Exception::ALL {
        let name = format!("FLUKE_EXCEPTION_{}", screaming(code.name()));
        define(h, &name, *code as u64);
    }
    for code in Insanity::ALL {
        let name = format!("FLUKE_INSANITY_{}", screaming(code.name()));
        define(h, &name, *code as u64);
    }
    for kind in object::Type::ALL {
        let name = format!("FLUKE_TYPE_{}", screaming(&format!("{kind:?}")));
        define(h, &name, kind as u64);
    }
    h.push('\n');
    for row in TABLE {
        let name = format!("FLUKE_ENTRY_{}", row.name.to_uppercase());
        define(h, &name, u64::from(row.number));
    }
}

fn objects(h: &mut String) {
    h.push_str("\n/* Memory that names an object; its contents are the kernel's. */\n");
    for kind in object::Type::ALL {
        let name = format!("{kind:?}").to_lowercase();
        let _ = writeln!(
            h,
            "typedef struct {{ _Alignas({size}) unsigned char fluke_opaque[{size}]; }} \
             fluke_{name}_t;",
            size = object::OBJECT_SIZE
        );
    }
}

fn structures(h: &mut String) {
    use state::*;
    c_struct!(h, Registers, "fluke_registers", [
        r15: "uint64_t $", r14: "uint64_t $", r13: "uint64_t $", r12: "uint64_t $",
        rbp: "uint64_t $", rbx: "uint64_t $", r11: "uint64_t $", r10: "uint64_t $",
        r9: "uint64_t $", r8: "uint64_t $", rdi: "uint64_t $", rsi: "uint64_t $",
        rdx: "uint64_t $", rcx: "uint64_t $", rax: "uint64_t $", rip: "uint64_t $",
        rflags: "uint64_t $", rsp: "uint64_t $",
    ]);
    c_struct!(h, Handlers, "fluke_handlers", [
        trap: "uint64_t $", interrupt: "uint64_t $", client_alert: "uint64_t $",
        server_alert: "uint64_t $",
    ]);
    c_struct!(h, SavedState, "fluke_saved_state", [
        rax: "uint64_t $", rcx: "uint64_t $", rdx: "uint64_t $", rip: "uint64_t $",
        rflags: "uint64_t $",
    ]);
    c_struct!(h, ThreadState, "fluke_thread_state", [
        hash: "uint64_t $", thread_va: "uint64_t $", sched_val: "uint64_t $",
        flags: "uint64_t $", priority: "uint64_t $", registers: "struct fluke_registers $",
        handlers: "struct fluke_handlers $", saved: "struct fluke_saved_state $",
        server_pset: "uint64_t $", fpu: "uint8_t $[512]",
    ]);
    c_struct!(h, TaskState, "fluke_task_state", [hash: "uint64_t $"]);
    c_struct!(h, RegionState, "fluke_region_state", [
        hash: "uint64_t $", start_va: "uint64_t $", size: "uint64_t $", prot: "uint64_t $",
    ]);
    c_struct!(h, MappingState, "fluke_mapping_state", [
        hash: "uint64_t $", region_off: "uint64_t $", start_va: "uint64_t $",
        size: "uint64_t $", prot: "uint64_t $",
    ]);
    c_struct!(h, PortState, "fluke_port_state", [hash: "uint64_t $", alias: "uint64_t $"]);
    c_struct!(h, PsetState, "fluke_pset_state", [hash: "uint64_t $"]);
    c_struct!(h, MutexState, "fluke_mutex_state", [
        hash: "uint64_t $", flags: "uint64_t $", locked: "uint64_t $",
    ]);
    c_struct!(h, CondState, "fluke_cond_state", [hash: "uint64_t $", flags: "uint64_t $"]);
    c_struct!(h, ObjectSpec, "fluke_object_spec", [object: "uint64_t $", kind: "uint64_t $"]);
    c_struct!(h, Census, "fluke_census", [objects: "uint64_t $[9]", frames: "uint64_t $"]);
    c_struct!(h, ipc::Buffer, "fluke_ipc_buffer", [address: "uint64_t $", words: "uint64_t $"]);
    c_struct!(h, ipc::Params, "fluke_ipc_params", [
        send: "struct fluke_ipc_buffer $", send_table: "const struct fluke_ipc_buffer *$",
        send_ref_table: "fluke_ref_t *const *$", recv: "struct fluke_ipc_buffer $",
        recv_table: "const struct fluke_ipc_buffer *$", recv_ref_table: "fluke_ref_t *const *$",
        send_buffers: "uint8_t $", send_refs: "uint8_t $", recv_buffers: "uint8_t $",
        recv_refs: "uint8_t $", flavour: "uint8_t $", reserved: "uint8_t $[3]",
        alias: "uint64_t $",
    ]);
    c_struct!(h, ipc::ExceptionMessage, "fluke_exception_message", [
        magic: "uint64_t $", code: "uint64_t $", subcode: "uint64_t $", access: "uint64_t $",
        region_offset: "uint64_t $", region_hash: "uint64_t $", thread_hash: "uint64_t $",
        rip: "uint64_t $",
    ]);
}

/// A stub for an entry point that takes its parameters in registers.
fn registers_stub(h: &mut String, row: &Row) {
    assert!(row.parameters.len() <= REGISTERS.len(), "{}", row.name);
    prototype(h, row);
    for (register, (name, _)) in REGISTERS.iter().zip(row.parameters) {
        let _ = writeln!(
            h,
            "    register uint64_t fluke_{register} __asm__(\"{register}\") = (uint64_t)({name});"
        );
    }
    let _ = writeln!(h, "    uint64_t fluke_rax = {};", row.number);
    let outputs: Vec<String> = REGISTERS
        .iter()
        .zip(row.parameters)
        .map(|(r, _)| format!(", \"+r\"(fluke_{r})"))
        .collect();
    call(h, &outputs.concat());
    h.push_str("    return fluke_rax;\n}\n");
}

/// A stub for a message transfer: all of the structure travels, and comes back changed.
fn message_stub(h: &mut String, row: &Row) {
    prototype(h, row);
    let target = match row.parameters {
        [(target, _), _] => target,
        _ => "0",
    };
    let _ = writeln!(
        h,
        "    uint64_t fluke_rax = {number}ul | (uint64_t)params->send_buffers << 16\n\
         \x20       | (uint64_t)params->send_refs << 24 | (uint64_t)params->recv_buffers << 32\n\
         \x20       | (uint64_t)params->recv_refs << 40;",
        number = row.number
    );
    let values = [
        ("rdi", target),
        ("rsi", "params->send.address"),
        ("rdx", "params->send.words"),
        ("r10", "params->recv.address"),
        ("r8", "params->recv.words"),
        ("r9", "params->send_table"),
        ("r12", "params->send_ref_table"),
        ("r13", "params->recv_table"),
        ("r14", "params->recv_ref_table"),
        ("r15", "0"),
    ];
    let mut outputs = String::new();
    for (register, value) in values {
        let _ = writeln!(
            h,
            "    register uint64_t fluke_{register} __asm__(\"{register}\") = (uint64_t)({value});"
        );
        let _ = write!(outputs, ", \"+r\"(fluke_{register})");
    }
    call(h, &outputs);
    h.push_str(
        "    params->recv.address = fluke_r10;\n\
         \x20   params->recv.words = fluke_r8;\n\
         \x20   params->recv_table = (const struct fluke_ipc_buffer *)fluke_r13;\n\
         \x20   params->recv_ref_table = (fluke_ref_t *const *)fluke_r14;\n\
         \x20   params->recv_buffers = (uint8_t)(fluke_rax >> 32);\n\
         \x20   params->recv_refs = (uint8_t)(fluke_rax >> 40);\n\
         \x20   params->flavour = (uint8_t)(fluke_rax >> 48);\n\
         \x20   params->alias = fluke_r15;\n\
         \x20   return fluke_rax & 0xffff;\n}\n",
    );
}

fn prototype(h: &mut String, row: &Row) {
    let mut parameters: Vec<String> = row
        .parameters
        .iter()
        .map(|(name, ty)| declaration(name, ty))
        .collect();
    if parameters.is_empty() {
        parameters.push("void".into());
    }
    let _ = writeln!(
        h,
        "\n/* {} */\nstatic inline uint64_t fluke_{}({})\n{{",
        row.doc,
        row.name,
        parameters.join(", ")
    );
}

/// The call through the gate. The red zone is stepped over, since `call` pushes into it.
fn call(h: &mut String, outputs: &str) {
    let _ = writeln!(
        h,
        "    __asm__ volatile(\"lea -128(%%rsp), %%rsp\\n\\tcall *%[gate]\\n\\t\"\n\
         \x20       \"lea 128(%%rsp), %%rsp\" : \"+a\"(fluke_rax){outputs}\n\
         \x20       : [gate] \"b\"(FLUKE_GATE) : \"rcx\", \"r11\", \"memory\", \"cc\");"
    );
}

/// A C declaration for a parameter of a Rust type from the entry table.
fn declaration(name: &str, ty: &str) -> String {
    // `stringify!` leaves it open where it puts spaces.
    let ty = &ty.replace("* ", "*");
    let (pointee, qualifier) = match (ty.strip_prefix("*mut "), ty.strip_prefix("*const ")) {
        (Some(pointee), _) => (pointee, ""),
        (_, Some(pointee)) => (pointee, "const "),
        _ => return format!("{} {name}", scalar(ty)),
    };
    if let Some(inner) = pointee.strip_prefix("*mut ") {
        return format!("{}*{qualifier}*{name}", c_type(inner) + " ");
    }
    format!("{qualifier}{} *{name}", c_type(pointee))
}

fn c_type(ty: &str) -> String {
    if object::Type::ALL.iter().any(|k| k.name() == ty) {
        return format!("fluke_{}_t", ty.to_lowercase());
    }
    match ty {
        "u8" => "void".into(),
        "Buffer" | "Params" => format!("struct fluke_ipc_{}", ty.to_lowercase()),
        _ if ty.starts_with(char::is_uppercase) => {
            format!("struct fluke_{}", screaming(ty).to_lowercase())
        }
        _ => scalar(ty).into(),
    }
}

fn scalar(ty: &str) -> &'static str {
    match ty {
        "u64" | "usize" => "uint64_t",
        "u32" => "uint32_t",
        "u16" => "uint16_t",
        "u8" => "uint8_t",
        "i64" => "int64_t",
        other => panic!("the entry table has a type that C has no name for here: {other}"),
    }
}

/// `CamelCase` as `CAMEL_CASE`.
fn screaming(name: &str) -> String {
    let mut out = String::new();
    for (i, c) in name.char_indices() {
        if i > 0 && c.is_uppercase() && !out.ends_with(|p: char| p.is_ascii_digit()) {
            out.push('_');
        }
        out.push(c.to_ascii_uppercase());
    }
    out
}
