//! Memory slots.
//!
//! Purpose: give KVM the guest's RAM, with single pages taken out (an access or fetch there exits), and collect the pages
//! KVM saw written.
//! Invariants: every page of RAM is in exactly one slot or taken out. Dirty logging is always on; what a slot had logged is
//! collected before it is deleted. Slots cover whole pages, sorted by address, and never overlap.
//! Elsewhere: which pages are taken out ([`crate::sensitive`]); accesses to them ([`crate::exit`]).
//! Source: KVM API, sections 4.35 (`KVM_SET_USER_MEMORY_REGION`), 4.8 (`KVM_GET_DIRTY_LOG`).

// Registers host mappings of guest memory with KVM.
#![allow(unsafe_code)]

use crate::vcpu::{failed, host_error};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use machine::engine::EngineError;
use machine::memory::RamRange;
use machine::{GuestMemory, PageSet};
use std::collections::BTreeMap;
use x86::{PAGE_SIZE, PageFrame};

/// A slot that is only made to be deleted lies here, above all RAM.
const SCRATCH_ADDR: u64 = 1 << 38;

#[derive(Clone, Copy, Debug)]
struct Slot {
    id: u32,
    pages: u64,
}

/// The slots of one virtual machine.
#[derive(Debug)]
pub(crate) struct Slots {
    ram: Vec<RamRange>,
    /// Keeps the mappings alive that KVM uses.
    _memory: GuestMemory,
    /// By first page.
    slots: BTreeMap<u64, Slot>,
    free: Vec<u32>,
    next: u32,
    limit: u32,
    out: PageSet,
    dirty: PageSet,
}

impl Slots {
    /// Registers all of `memory` but the pages of `out`. `limit` is how many slots KVM allows.
    pub(crate) fn new(
        vm: &VmFd,
        memory: &GuestMemory,
        out: PageSet,
        limit: usize,
    ) -> Result<Self, EngineError> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let ram = memory.ranges();
        let mut slots = Self {
            ram,
            _memory: memory.clone(),
            slots: BTreeMap::new(),
            free: Vec::new(),
            next: 0,
            limit,
            out,
            dirty: PageSet::new(),
        };
        for (first, pages) in slots.covered() {
            slots.add(vm, first, pages)?;
        }
        Ok(slots)
    }

    /// Runs of pages that belong into slots.
    fn covered(&self) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        for range in &self.ram {
            let start = range.base.get() / PAGE_SIZE;
            let end = start + range.size / PAGE_SIZE;
            let mut first = start;
            for page in self.out.range(PageFrame::new(start)..PageFrame::new(end)) {
                runs.push((first, page.number() - first));
                first = page.number() + 1;
            }
            runs.push((first, end - first));
        }
        runs.retain(|&(_, pages)| pages != 0);
        runs
    }

    /// Whether `page` is RAM that has been taken out.
    pub(crate) fn is_out(&self, page: PageFrame) -> bool {
        self.out.contains(&page)
    }

    /// Whether any page has been taken out.
    pub(crate) fn any_out(&self) -> bool {
        !self.out.is_empty()
    }

    /// How many pages have been taken out.
    pub(crate) fn count_out(&self) -> u64 {
        self.out.len() as u64
    }

    /// Takes one page out. No effect on a page that is out already or is not RAM.
    pub(crate) fn take_out(&mut self, vm: &VmFd, page: PageFrame) -> Result<(), EngineError> {
        let number = page.number();
        let Some((&first, &slot)) = self.slots.range(..=number).next_back() else {
            return Ok(());
        };
        let behind = first + slot.pages;
        if number >= behind {
            return Ok(());
        }
        self.remove(vm, first, slot)?;
        if number > first {
            self.add(vm, first, number - first)?;
        }
        if behind > number + 1 {
            self.add(vm, number + 1, behind - number - 1)?;
        }
        self.out.insert(page);
        Ok(())
    }

    /// Puts one page back, into a slot of its own.
    pub(crate) fn put_back(&mut self, vm: &VmFd, page: PageFrame) -> Result<(), EngineError> {
        if self.out.remove(&page) {
            self.add(vm, page.number(), 1)?;
        }
        Ok(())
    }

    /// The pages written by the guest through KVM since the last call.
    pub(crate) fn take_dirty(&mut self, vm: &VmFd) -> Result<PageSet, EngineError> {
        let mut dirty = std::mem::take(&mut self.dirty);
        for (&first, slot) in &self.slots {
            collect(vm, first, *slot, &mut dirty)?;
        }
        Ok(dirty)
    }

    /// Makes KVM forget all shadow page tables: deleting any slot does.
    pub(crate) fn drop_shadows(&mut self, vm: &VmFd) -> Result<(), EngineError> {
        let Some(host) = self.ram.first().map(|range| range.host as u64) else {
            return Ok(());
        };
        let id = self.new_id()?;
        for size in [PAGE_SIZE, 0] {
            set(vm, id, SCRATCH_ADDR, size, host, 0)?;
        }
        self.free.push(id);
        Ok(())
    }

    fn new_id(&mut self) -> Result<u32, EngineError> {
        if let Some(id) = self.free.pop() {
            return Ok(id);
        }
        if self.next >= self.limit {
            return Err(failed(
                "KVM_SET_USER_MEMORY_REGION",
                "this KVM allows no more memory slots",
            ));
        }
        self.next += 1;
        Ok(self.next - 1)
    }

    fn add(&mut self, vm: &VmFd, first: u64, pages: u64) -> Result<(), EngineError> {
        let id = self.new_id()?;
        let addr = first * PAGE_SIZE;
        let host = self
            .host(addr)
            .ok_or_else(|| failed("KVM_SET_USER_MEMORY_REGION", "no such RAM"))?;
        set(
            vm,
            id,
            addr,
            pages * PAGE_SIZE,
            host,
            KVM_MEM_LOG_DIRTY_PAGES,
        )?;
        self.slots.insert(first, Slot { id, pages });
        Ok(())
    }

    fn remove(&mut self, vm: &VmFd, first: u64, slot: Slot) -> Result<(), EngineError> {
        collect(vm, first, slot, &mut self.dirty)?;
        let addr = first * PAGE_SIZE;
        set(
            vm,
            slot.id,
            addr,
            0,
            self.host(addr).unwrap_or(0),
            KVM_MEM_LOG_DIRTY_PAGES,
        )?;
        self.slots.remove(&first);
        self.free.push(slot.id);
        Ok(())
    }

    /// Where the host has this guest-physical address.
    fn host(&self, addr: u64) -> Option<u64> {
        self.ram.iter().find_map(|range| {
            let offset = addr.checked_sub(range.base.get())?;
            (offset < range.size).then(|| range.host as u64 + offset)
        })
    }
}

fn set(
    vm: &VmFd,
    slot: u32,
    addr: u64,
    size: u64,
    host: u64,
    flags: u32,
) -> Result<(), EngineError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: addr,
        memory_size: size,
        userspace_addr: host,
    };
    // SAFETY: `host` and `size` lie within one RAM range of the `GuestMemory` that `Slots` holds for as long as it lives; the
    // virtual machine runs only through the engine that owns both. Guest writes go to memory that is only ever copied.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|e| host_error("KVM_SET_USER_MEMORY_REGION", e))
}

fn collect(vm: &VmFd, first: u64, slot: Slot, dirty: &mut PageSet) -> Result<(), EngineError> {
    let size = usize::try_from(slot.pages * PAGE_SIZE)
        .map_err(|_| failed("KVM_GET_DIRTY_LOG", "slot too large for this host"))?;
    let bitmap = vm
        .get_dirty_log(slot.id, size)
        .map_err(|e| host_error("KVM_GET_DIRTY_LOG", e))?;
    for (word, &bits) in bitmap.iter().enumerate() {
        let mut bits = bits;
        while bits != 0 {
            let page = word as u64 * 64 + u64::from(bits.trailing_zeros());
            if page < slot.pages {
                dirty.insert(PageFrame::new(first + page));
            }
            bits &= bits - 1;
        }
    }
    Ok(())
}
