//! The spec's seccomp profile as a classic BPF program.
//!
//! Only calls of the native architecture are told apart: a program of another one (i386, x32) gets
//! the default action, or is killed if that allows. Source: seccomp(2); OCI runtime-spec
//! config-linux.md "Seccomp"; where a profile is ambiguous, runc's reading of it.

use nix::errno::Errno;

use super::syscalls;
use crate::pb::grpc::linux_syscall::ErrnoRet;
use crate::pb::grpc::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};
use crate::status::{Context, Result, Status};

// Source: linux/seccomp.h, linux/audit.h, linux/filter.h.
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const FLAG_LOG: u64 = 2;
const FLAG_SPEC_ALLOW: u64 = 4;
const ARCHITECTURE: u32 = 0xc000_003e;
const X32_BIT: u32 = 0x4000_0000;
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;
const LOAD: u16 = 0x20;
const RETURN: u16 = 0x06;
const AND: u16 = 0x54;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;
/// Source: linux/bpf_common.h, BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;

/// A profile ready to be loaded.
pub struct Filter {
    code: Vec<libc::sock_filter>,
    flags: u64,
}

fn load(offset: u32) -> libc::sock_filter {
    libc::sock_filter { code: LOAD, jt: 0, jf: 0, k: offset }
}

fn give(action: u32) -> libc::sock_filter {
    libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: action }
}

fn jump(code: u16, value: u32, if_true: u8, if_false: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt: if_true, jf: if_false, k: value }
}

impl Filter {
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self> {
        let default = action(&profile.default_action, None)?;
        let foreign = if default == ALLOW || default == LOG { KILL_PROCESS } else { default };
        let mut code = vec![
            load(ARCHITECTURE_OFFSET),
            jump(JUMP_EQUAL, ARCHITECTURE, 1, 0),
            give(foreign),
            load(NUMBER_OFFSET),
            jump(JUMP_GREATER_EQUAL, X32_BIT, 0, 1),
            give(foreign),
        ];
        // Rules with conditions come first, or one without would hide them.
        for rule in profile.syscalls.iter().filter(|rule| !rule.args.is_empty()) {
            conditional(&mut code, rule)?;
        }
        for rule in profile.syscalls.iter().filter(|rule| rule.args.is_empty()) {
            let action = action_of(rule)?;
            for number in rule.names.iter().filter_map(|name| syscalls::number(name)) {
                code.push(jump(JUMP_EQUAL, number, 0, 1));
                code.push(give(action));
            }
        }
        code.push(give(default));
        if code.len() > MAX_INSTRUCTIONS {
            return Err(Status::invalid("the seccomp profile is too long"));
        }
        let flag = |name, value| {
            if profile.flags.iter().any(|flag| flag == name) { value } else { 0 }
        };
        let flags = flag("SECCOMP_FILTER_FLAG_LOG", FLAG_LOG)
            | flag("SECCOMP_FILTER_FLAG_SPEC_ALLOW", FLAG_SPEC_ALLOW);
        Ok(Self { code, flags })
    }

    /// Puts the profile into force for this process. Needs no_new_privs or CAP_SYS_ADMIN.
    pub fn enforce(&self) -> Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.code.len()).context(|| "seccomp".to_owned())?,
            filter: self.code.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads the program, which lives for the call, and does not write it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        Errno::result(result).context(|| "loading the seccomp profile".to_owned())?;
        Ok(())
    }

    /// The first of these calls, by name and arguments, that the profile does not let through.
    pub fn first_refused(&self, calls: &[(&'static str, [u64; 6])]) -> Option<&'static str> {
        let allows = |name, arguments| {
            let number = syscalls::number(name)?;
            Some(matches!(self.run(ARCHITECTURE, number, arguments), ALLOW | LOG))
        };
        let refused = calls.iter().find(|(name, arguments)| allows(name, *arguments) != Some(true));
        refused.map(|(name, _)| *name)
    }

    /// What the kernel would do with a call: an interpreter of the few instructions made here.
    fn run(&self, architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let word = |offset: u32| match offset {
            NUMBER_OFFSET => number,
            ARCHITECTURE_OFFSET => architecture,
            _ => {
                let bytes = offset - ARGUMENTS_OFFSET;
                let argument = arguments[(bytes / 8) as usize] >> (8 * (bytes % 8));
                u32::try_from(argument & 0xffff_ffff).unwrap_or(0)
            }
        };
        let (mut at, mut value) = (0, 0);
        while let Some(step) = self.code.get(at) {
            let branch = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
            at += 1;
            match step.code {
                LOAD => value = word(step.k),
                AND => value &= step.k,
                JUMP_EQUAL => at += branch(value == step.k),
                JUMP_GREATER => at += branch(value > step.k),
                JUMP_GREATER_EQUAL => at += branch(value >= step.k),
                _ => return step.k, // RETURN, the only other one
            }
        }
        KILL_PROCESS // the kernel loads no program that has no end
    }
}

fn action_of(rule: &LinuxSyscall) -> Result<u32> {
    let errno = rule.errno_ret.as_ref().map(|ErrnoRet::Errnoret(errno)| *errno);
    action(&rule.action, errno)
}

fn action(name: &str, errno: Option<u32>) -> Result<u32> {
    let data = errno.unwrap_or(libc::EPERM.cast_unsigned()) & 0xffff;
    Ok(match name {
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_ERRNO" => ERRNO | data,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_LOG" => LOG,
        "SCMP_ACT_TRACE" => TRACE | data,
        "SCMP_ACT_TRAP" => TRAP,
        other => return Err(Status::unimplemented(format!("seccomp action {other:?}"))),
    })
}

/// Conditions of one rule must all hold; but if two are on the same argument, any one is enough.
fn conditional(code: &mut Vec<libc::sock_filter>, rule: &LinuxSyscall) -> Result<()> {
    let action = action_of(rule)?;
    let repeated = rule
        .args
        .iter()
        .enumerate()
        .any(|(at, arg)| rule.args[..at].iter().any(|before| before.index == arg.index));
    let groups: Vec<&[LinuxSeccompArg]> =
        if repeated { rule.args.chunks(1).collect() } else { vec![&rule.args] };
    for number in rule.names.iter().filter_map(|name| syscalls::number(name)) {
        for group in &groups {
            let mut tests = Vec::new();
            for arg in *group {
                tests.push(condition(arg)?);
            }
            // Behind a group that does not hold, the number is loaded again for the next.
            let mut block = Vec::new();
            for (at, test) in tests.iter().enumerate() {
                let after: usize = tests[at + 1..].iter().map(Vec::len).sum();
                block.extend(test.iter().map(|step| step.place(after + 1)));
            }
            block.push(give(action));
            block.push(load(NUMBER_OFFSET));
            let skip = u8::try_from(block.len()).context(|| "seccomp conditions".to_owned())?;
            code.push(jump(JUMP_EQUAL, number, 0, skip));
            code.append(&mut block);
        }
    }
    Ok(())
}

/// Where a step of a condition goes on.
#[derive(Clone, Copy)]
enum Next {
    /// So many steps further on, inside of the condition.
    Skip(u8),
    /// The condition holds: behind its own last step, which is so many steps away.
    Holds(u8),
    /// It does not: behind the last step of the last condition and its answer.
    Fails(u8),
}

struct Step {
    code: u16,
    value: u32,
    if_true: Next,
    if_false: Next,
}

impl Step {
    fn plain(code: u16, value: u32) -> Self {
        Self { code, value, if_true: Next::Skip(0), if_false: Next::Skip(0) }
    }

    /// The instruction, with `after` instructions between this condition's end and a failure's end.
    fn place(&self, after: usize) -> libc::sock_filter {
        let offset = |next| match next {
            Next::Skip(count) | Next::Holds(count) => count,
            Next::Fails(count) => count.saturating_add(u8::try_from(after).unwrap_or(u8::MAX)),
        };
        jump(self.code, self.value, offset(self.if_true), offset(self.if_false))
    }
}

/// One comparison of a 64-bit argument, as two of its halves: the upper decides unless it is equal.
fn condition(arg: &LinuxSeccompArg) -> Result<Vec<Step>> {
    if arg.index > 5 {
        return Err(Status::invalid(format!("seccomp argument {}", arg.index)));
    }
    let index = u32::try_from(arg.index).unwrap_or(0);
    let low_offset = ARGUMENTS_OFFSET + 8 * index;
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    let high = |value: u64| u32::try_from(value >> 32).unwrap_or(0);
    let load_low = Step::plain(LOAD, low_offset);
    let load_high = Step::plain(LOAD, low_offset + 4);
    let step = |code, value, if_true, if_false| Step { code, value, if_true, if_false };
    let (value, second) = (arg.value, arg.value_two);
    use Next::{Fails, Holds, Skip};
    let ordered = |code, on_greater: bool, on_low: bool| {
        let (greater, less) = if on_greater { (Holds(3), Fails(2)) } else { (Fails(3), Holds(2)) };
        let (yes, no) = if on_low { (Holds(0), Fails(0)) } else { (Fails(0), Holds(0)) };
        vec![
            Step::plain(LOAD, low_offset + 4),
            step(JUMP_GREATER, high(value), greater, Skip(0)),
            step(JUMP_EQUAL, high(value), Skip(0), less),
            Step::plain(LOAD, low_offset),
            step(code, low(value), yes, no),
        ]
    };
    Ok(match arg.op.as_str() {
        "SCMP_CMP_EQ" => vec![
            load_high,
            step(JUMP_EQUAL, high(value), Skip(0), Fails(2)),
            load_low,
            step(JUMP_EQUAL, low(value), Holds(0), Fails(0)),
        ],
        "SCMP_CMP_NE" => vec![
            load_high,
            step(JUMP_EQUAL, high(value), Skip(0), Holds(2)),
            load_low,
            step(JUMP_EQUAL, low(value), Fails(0), Holds(0)),
        ],
        // `value` is the mask, `value_two` what must be left.
        "SCMP_CMP_MASKED_EQ" => vec![
            load_high,
            Step::plain(AND, high(value)),
            step(JUMP_EQUAL, high(second), Skip(0), Fails(3)),
            load_low,
            Step::plain(AND, low(value)),
            step(JUMP_EQUAL, low(second), Holds(0), Fails(0)),
        ],
        "SCMP_CMP_GT" => ordered(JUMP_GREATER, true, true),
        "SCMP_CMP_GE" => ordered(JUMP_GREATER_EQUAL, true, true),
        "SCMP_CMP_LT" => ordered(JUMP_GREATER_EQUAL, false, false),
        "SCMP_CMP_LE" => ordered(JUMP_GREATER, false, false),
        other => return Err(Status::invalid(format!("seccomp operator {other:?}"))),
    })
}

#[cfg(test)]
#[path = "seccomp_tests.rs"]
mod tests;
