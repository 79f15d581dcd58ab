// The emulated kernels of refine in training mode against float64: see program.h.

#include "program.h"
#include "refine_training_test.h"

int main(int argc, char** argv) {
  return Program<TrainingTest>::main(argc, argv);
}
