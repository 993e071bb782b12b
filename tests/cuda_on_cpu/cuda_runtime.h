// Stands in for the header of CUDA that has this name.
#pragma once
#include "cuda_on_cpu.h"
